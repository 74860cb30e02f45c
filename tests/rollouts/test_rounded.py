"""A policy with float32 masters speaks as its rounded self, and its masters stay as they are."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from aligntune.models.kernels.joined import lay_together
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.graph import GraphEngine
from aligntune.rollouts.rounded import RoundedEngine
from aligntune.rollouts.transformers import TransformersEngine

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
PARAMS = SamplingParams(max_new_tokens=12, seed=3)


def models() -> tuple[Any, Any]:
    """A bfloat16 model, and float32 masters that round to it but are a third of a last digit away, all to one side."""
    half = tiny.model().to(torch.bfloat16).eval()
    masters = copy.deepcopy(half).float()
    with torch.no_grad():
        for parameter in masters.parameters():
            parameter.mul_(1 + 2**-10)  # less than half of a last digit, which is 2^-9 to 2^-8 of the number
    return half, masters


@pytest.mark.parametrize("engine", [GraphEngine, TransformersEngine])
def test_it_samples_from_the_rounded_weights(engine: type) -> None:
    half, masters = models()
    before = {name: parameter.clone() for name, parameter in masters.named_parameters()}
    want = engine(half).generate(PROMPTS, PARAMS)
    rounded = RoundedEngine(engine(masters), masters, torch.bfloat16)
    for _ in range(2):
        found = rounded.generate(PROMPTS, PARAMS)
        assert found.completion_ids == want.completion_ids
        assert found.sampler_log_probs == want.sampler_log_probs
    plain = engine(masters).generate(PROMPTS, PARAMS)
    assert plain.sampler_log_probs != want.sampler_log_probs
    for name, parameter in masters.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.dtype == torch.float32


class Laying(GraphEngine):
    """Moves weights as the engine does on a GPU, and keeps what it ran on."""

    ran_on: list[list[torch.Tensor]]

    def generate(self, prompt_ids: Any, params: SamplingParams) -> Any:
        lay_together(self.causal)
        self.ran_on.append([parameter.data for parameter in self.model.parameters()])
        return super().generate(prompt_ids, params)


def test_copies_stay_where_the_engine_has_moved_them() -> None:
    """Else every rollout would move them again, and capture its graphs anew."""
    half, masters = models()
    want = GraphEngine(half).generate(PROMPTS, PARAMS)
    inner = Laying(masters)
    inner.ran_on = []
    engine = RoundedEngine(inner, masters, torch.bfloat16)
    for _ in range(2):
        found = engine.generate(PROMPTS, PARAMS)
        assert found.completion_ids == want.completion_ids
    first, second = ([weight.data_ptr() for weight in weights] for weights in inner.ran_on)
    assert first == second
    assert {parameter.dtype for parameter in masters.parameters()} == {torch.float32}


def test_new_weights_are_heard_and_an_error_leaves_the_masters() -> None:
    _, masters = models()
    engine = RoundedEngine(GraphEngine(masters), masters, torch.bfloat16)
    first = engine.generate(PROMPTS, PARAMS)
    with torch.no_grad():
        for parameter in masters.parameters():
            parameter.mul_(1.5)
    assert engine.generate(PROMPTS, PARAMS).sampler_log_probs != first.sampler_log_probs
    with pytest.raises(Exception, match="prompt"):
        engine.generate([[]], PARAMS)
    assert {parameter.dtype for parameter in masters.parameters()} == {torch.float32}


def test_one_copy_serves_all_rollouts_until_it_is_released() -> None:
    """Captured graphs read where the copy lies; weights that are not float32 have none."""
    model = tiny.model()
    model.model.norm.to(torch.bfloat16)
    seen: list[dict[str, tuple[int, torch.dtype]]] = []
    told: list[str] = []

    def generate(*_: Any) -> None:
        seen.append({name: (weight.data_ptr(), weight.dtype) for name, weight in model.named_parameters()})

    spy: Any = SimpleNamespace(
        name="spy", generate=generate, release=lambda: told.append("release"), update_weights=lambda: told.append("new")
    )
    engine = RoundedEngine(spy, model, torch.bfloat16)
    for _ in range(2):
        engine.generate(PROMPTS, PARAMS)
    assert seen[0] == seen[1]
    assert {dtype for _, dtype in seen[0].values()} == {torch.bfloat16}
    own = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    assert [name for name, (place, _) in seen[0].items() if place == own[name]] == ["model.norm.weight"]
    engine.update_weights()
    engine.release()
    assert (engine.name, told, engine._copies) == ("spy", ["new", "release"], {})
