"""Tiny random models whose next-token distributions are far from uniform."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SHAPE = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
}


def _build(name="llama", **kwargs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], **kwargs)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def build_model():
    """build_model(name, **from_config_arguments) -> a fresh model; names: llama, qwen2 (tied), qwen3, mistral (sliding)."""
    return _build


@pytest.fixture
def model():
    return _build()


@pytest.fixture
def capped_model():
    """A model that the graph engine cannot run: it caps attention scores."""
    return AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, attn_logit_softcapping=2.0))
