"""An engine for evaluation: the same answers as transformers, and nothing kept between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aligntune.errors import ConfigError
from aligntune.rollouts import occasional
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.occasional import OccasionalEngine, occasional_engine
from aligntune.rollouts.rounded import RoundedEngine
from aligntune.rollouts.transformers import TransformersEngine

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4], [13, 14]]
GREEDY = SamplingParams(max_new_tokens=9, temperature=0, stop_token_ids=(3, 17), seed=0)


def inner(engine: Any) -> Any:
    assert isinstance(engine, OccasionalEngine)
    return engine.engine


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_answers_are_those_of_transformers(build_model, name: str):
    model = build_model(name)
    engine, why = occasional_engine(model)
    assert engine.name == "graph"
    assert "it runs this model" in why
    want = TransformersEngine(model).generate(PROMPTS, GREEDY)
    for rows in (None, 1, 3):
        found = occasional_engine(model, max_rows=rows)[0].generate(PROMPTS, GREEDY)
        assert found.completion_ids == want.completion_ids
        assert found.finished == want.finished


def test_memory_is_given_back_also_after_an_error(model):
    engine, _ = occasional_engine(model, compute=torch.bfloat16)
    rounded = inner(engine)
    assert isinstance(rounded, RoundedEngine)
    seen: list[bool] = []
    choose, graph = rounded.engine._generate, rounded.engine
    graph._generate = lambda *args: seen.append(bool(rounded._copies)) or choose(*args)
    engine.generate(PROMPTS, GREEDY)
    assert seen == [True]
    assert (rounded._copies, graph.store, graph.sessions) == ({}, None, [])
    with pytest.raises(ConfigError, match="no tokens"):
        engine.generate([[]], GREEDY)
    assert (rounded._copies, graph.store, graph.sessions) == ({}, None, [])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(hasattr(module, "aligntune_keys") for module in model.modules())


def test_rows_at_a_time(model):
    assert inner(occasional_engine(model)[0]).max_rows == occasional.CPU_ROWS
    assert inner(occasional_engine(model, max_rows=5)[0]).max_rows == 5
    assert inner(occasional_engine(model, name="transformers")[0]).max_rows == occasional.TRANSFORMERS_ROWS
    assert inner(occasional_engine(model, name="transformers", max_rows=5)[0]).max_rows == 5


def test_layers_are_not_compiled(model):
    assert inner(occasional_engine(model)[0]).compile_layers is False


def test_transformers_where_graph_cannot_run(capped_model):
    engine, why = occasional_engine(capped_model)
    assert engine.name == "transformers"
    assert "soft-capping" in why
    assert len(engine.generate(PROMPTS, GREEDY)) == 4


def test_a_model_in_training_is_tried_without_its_dropout(build_model):
    """With dropout in the forward pass that it is compared with, the engine's log-probabilities would look wrong."""
    model = build_model("llama", attn_implementation="eager")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    state = torch.get_rng_state()
    engine, _ = occasional_engine(model)
    engine.generate(PROMPTS, GREEDY)
    assert engine.name == "graph"
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
