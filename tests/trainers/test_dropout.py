"""Without dropout two passes in training mode say the same, however an architecture keeps its rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aligntune.trainers.dropout import disable_dropout

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "attention_dropout": 0.3},
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16, "layerdrop": 0.5},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.3, "attention_dropout": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_two_passes_are_equal(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=50, **SIZES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    ids = torch.arange(3, 20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    first = model(ids).logits
    assert all(torch.equal(first, model(ids).logits) for _ in range(3))
