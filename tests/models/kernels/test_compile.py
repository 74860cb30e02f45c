"""Compiled layers give the plain numbers, compile once for all layers and shapes, and come off again."""

import pytest
import torch
import torch._dynamo.testing
from transformers import AutoModelForCausalLM, Qwen2Config

from aligntune.models.forward import packed_loss
from aligntune.models.kernels import compile as kernels
from aligntune.models.kernels.attention import resolve_attention
from aligntune.models.packed import PackedRows
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.graph import GraphEngine

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def compilations(monkeypatch):
    """Compile without generating code, and count how often."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: plain_compile(f, backend=counter, **k))
    kernels._compiled_for_training.cache_clear()
    kernels._compiled_for_decoding.cache_clear()
    yield counter
    kernels._compiled_for_training.cache_clear()
    kernels._compiled_for_decoding.cache_clear()


def test_one_compilation_for_all_layers_and_shapes(compilations):
    torch.manual_seed(0)
    name, _ = resolve_attention("sdpa", "cpu")
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, vocab_size=61), attn_implementation=name)
    batches = [[[3, 4, 5, 6], [7, 8]], [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12]], [[5] * 9]]
    rows = [PackedRows.build(batch, [[True] * len(row) for row in batch]) for batch in batches]
    want = [packed_loss(model, r).item() for r in rows]
    assert kernels.compile_layers(model) == 4
    got = [packed_loss(model, r).item() for r in rows]
    assert got == pytest.approx(want, rel=1e-5)
    frames = compilations.frame_count
    assert frames <= 2  # with a packed mask, and without
    rollouts = GraphEngine(model).generate([[3, 4]], SamplingParams(max_new_tokens=3, temperature=0))
    assert len(rollouts.completion_ids[0]) == 3
    assert compilations.frame_count == frames  # rollouts run the plain layers
    assert packed_loss(model, rows[0]).item() == pytest.approx(want[0], rel=1e-5)
    kernels.restore_layers(model)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)
