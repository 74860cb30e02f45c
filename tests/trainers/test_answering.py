"""The engine that answers for a session: rounded under autocast, transformers over shards, one for all questions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from aligntune.models.precision import Precision
from aligntune.rollouts.rounded import RoundedEngine
from aligntune.trainers.answering import generator_of
from aligntune.trainers.pairs import PairsSession
from aligntune.trainers.sft import SFTSession


def session(precision: Precision, dtype: torch.dtype = torch.float32) -> Any:
    model, config = tiny.model().to(dtype), SimpleNamespace(train=SimpleNamespace(seed=5))
    return SimpleNamespace(model=model, tokenizer=tiny.tokenizer(), precision=precision, config=config)


@pytest.mark.parametrize(
    ("precision", "dtype", "rounded"),
    [
        (Precision(torch.float32), torch.float32, False),
        (Precision(torch.bfloat16), torch.float32, True),
        (Precision(torch.bfloat16, split=True), torch.bfloat16, False),  # the weights themselves are bfloat16
    ],
)
def test_it_speaks_in_the_format_that_is_trained(precision: Precision, dtype: torch.dtype, rounded: bool) -> None:
    generator = generator_of(session(precision, dtype))
    assert isinstance(generator.engine.engine, RoundedEngine) is rounded
    assert generator.engine.name == "graph"
    assert generator.seed == 5
    assert len(generator.generate(["say red"], max_new_tokens=2)) == 1


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "transformers"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "transformers"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "graph"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "graph"),
    ],
)
def test_shards_are_read_by_transformers(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    generator = generator_of(session(Precision(torch.bfloat16)))
    assert generator.engine.name == name
    assert isinstance(generator.engine.engine, RoundedEngine) is (name == "graph")


@pytest.mark.parametrize("kind", [SFTSession, PairsSession])
def test_a_session_has_one(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    made: list[Any] = []
    monkeypatch.setattr("aligntune.trainers.answering.generator_of", lambda session: made.append(session) or object())
    run = object.__new__(kind)
    assert run.generator is run.generator
    assert made == [run]
