"""A policy that DeepSpeed ZeRO-3 shards: its weights are gathered around a generation, or not, as the setting says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.transformers import TransformersEngine
from aligntune.trainers.replica import engine_of_sharded


@pytest.mark.parametrize(("stage", "gather", "expected"), [("3", True, 1), ("3", False, 0), ("2", True, 0)])
def test_shards_are_whole_while_generating(
    monkeypatch: pytest.MonkeyPatch, stage: str, gather: bool, expected: int
) -> None:
    """`deepspeed.zero.GatheredParameters` is a stand-in that counts: it gets every weight, and is left before the next step."""
    model, inside, seen = tiny.model(), [], []

    @contextmanager
    def gathered(weights: list[Any]) -> Iterator[None]:
        inside.append(len(weights))
        yield
        inside.clear()

    class Watching(TransformersEngine):
        def generate(self, *args: Any) -> Any:
            seen.extend(inside)
            return super().generate(*args)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    monkeypatch.setattr("aligntune.rollouts.transformers.TransformersEngine", Watching)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    engine, why = engine_of_sharded(model, lambda policy: (Watching(policy), "chosen"), gather=gather)
    assert why == ("ZeRO-3 shards are gathered for it" if expected else "chosen")
    engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=2, stop_token_ids=(2,)))
    assert seen == [len(list(model.parameters()))] * expected
    assert inside == []
