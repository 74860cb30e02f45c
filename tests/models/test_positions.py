"""Rows that outgrow a model's positions are refused; rows that change each other's numbers are announced."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Phi3Config

from aligntune.errors import ModelError
from aligntune.models.forward import packed_log_probs, packed_loss
from aligntune.models.packed import PackedRows
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.graph import GraphEngine
from aligntune.rollouts.transformers import TransformersEngine

SHAPE = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        OPTConfig(vocab_size=61, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16),
    ],
    ids=["gpt2", "opt"],
)  # fmt: skip
def test_a_row_beyond_the_table_of_positions_is_refused(config):
    model = AutoModelForCausalLM.from_config(config)
    packed_loss(model, PackedRows.from_completions([[3] * 30, [4] * 20], [[5, 6], [7] * 12]))
    with pytest.raises(ModelError, match=r"a row of 33 tokens is too long: .* has positions for 32"):
        packed_loss(model, PackedRows.from_completions([[3] * 30], [[5, 6, 7]]))
    for engine in (GraphEngine(model), TransformersEngine(model)):
        with pytest.raises(ModelError, match="a row of 33 tokens"):
            engine.generate([[3], [4] * 30], SamplingParams(max_new_tokens=3))


def test_computed_positions_have_no_table():
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, max_position_embeddings=32))
    packed_loss(llama, PackedRows.from_completions([[3] * 30], [[5, 6, 7]]))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_of_the_longest_row_are_announced_once(kind, caplog):
    torch.manual_seed(3)
    rope = {"rope_type": kind, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    else:
        rope |= {"factor": 4.0}
    family = Phi3Config if kind == "longrope" else LlamaConfig
    limits = (
        {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
        if kind == "longrope"
        else {"max_position_embeddings": 16}
    )
    model = AutoModelForCausalLM.from_config(
        family(**SHAPE, **limits, pad_token_id=0, initializer_range=1.0, rope_parameters=rope)
    ).eval()
    short, long = [[3, 4, 5]], [[6] * 20]

    def of_short(*others):
        with torch.no_grad():
            return packed_log_probs(
                model, PackedRows.from_completions([*short, *others], [[7]] * (1 + len(others)))
            ).log_probs[0]

    with caplog.at_level(logging.WARNING, "aligntune"):
        alone = of_short([8] * 9)
        assert "rotary" not in caplog.text
        beside = [of_short(*long), of_short(*long)]
    assert caplog.text.count("takes its rotary frequencies from the longest row") == 1
    assert "more than 16 tokens" in caplog.text
    assert abs(alone - beside[0]) > 1e-6
