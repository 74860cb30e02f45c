"""Which engine is chosen, and the reason given."""

import pytest

from aligntune.errors import BackendError, ConfigError
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.select import select_engine


def test_graph_where_it_runs(model):
    engine, why = select_engine(model, max_rows=7)
    assert engine.name == "graph"
    assert engine.max_rows == 7
    assert "in place" in why


def test_transformers_for_settings_that_graph_does_not_know(model):
    params = SamplingParams.build({"no_repeat_ngram_size": 3}, max_new_tokens=4)
    engine, why = select_engine(model, params=params)
    assert engine.name == "transformers"
    assert "no_repeat_ngram_size" in why
    with pytest.raises(BackendError, match="no_repeat_ngram_size"):
        select_engine(model, "graph", params)


def test_transformers_for_models_that_graph_cannot_run(capped_model):
    engine, why = select_engine(capped_model)
    assert engine.name == "transformers"
    assert "soft-capping" in why


def test_transformers_for_a_model_on_several_devices(model):
    model.model.norm.to("meta")
    engine, why = select_engine(model)
    assert engine.name == "transformers"
    assert "several devices" in why


def test_compiled_layers_are_not_compiled_once_more_for_the_trial(model):
    def compiled(*args, **kwargs):
        raise AssertionError("the trial runs the plain layers")

    for layer in model.model.layers:
        layer.forward = compiled
    assert select_engine(model)[0].name == "graph"
    assert all(layer.forward is compiled for layer in model.model.layers)


def test_by_name(model):
    engine, why = select_engine(model, "transformers")
    assert (engine.name, why) == ("transformers", "asked for")
    with pytest.raises(ConfigError, match="there are auto, graph"):
        select_engine(model, "vlllm")
    with pytest.raises(ConfigError, match="weights_dir"):
        select_engine(model, "vllm-server")
    with pytest.raises(ConfigError, match="server_url"):
        select_engine(model, "vllm-server", weights_dir="/tmp")


def test_on_a_model_of_unsloth_its_two_modes_enclose_the_rollout(model):
    calls = []
    model.for_inference = lambda: calls.append("inference")
    model.for_training = lambda use_gradient_checkpointing: calls.append(use_gradient_checkpointing)
    engine, why = select_engine(model)
    assert (engine.name, "Unsloth" in why) == ("unsloth", True)
    model.train()
    params = SamplingParams(max_new_tokens=3, seed=1)
    found = engine.generate([[3, 4, 5]], params)
    assert calls == ["inference", False]
    assert model.training
    del model.for_inference
    plain, _ = select_engine(model, "transformers")
    assert plain.name == "transformers"
    assert plain.generate([[3, 4, 5]], params).completion_ids == found.completion_ids
