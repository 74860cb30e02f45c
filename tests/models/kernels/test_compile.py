"""Compiled layers give the plain numbers, compile once for all layers and shapes, and come off again."""

import types

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


CACHES = (kernels._compiled_for_training, kernels._compiled_for_decoding)


@pytest.fixture
def compilations(monkeypatch):
    """Compile without generating code, and count how often."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: plain_compile(f, backend=counter, **k))
    for compiled in CACHES:
        compiled.cache_clear()
    yield counter
    for compiled in CACHES:
        compiled.cache_clear()


@pytest.mark.parametrize("keep", ["all", "half"])
def test_one_compilation_for_all_layers_and_shapes(compilations, keep):
    torch.manual_seed(0)
    name, _ = resolve_attention("sdpa", "cpu")
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, vocab_size=61), attn_implementation=name)
    batches = [[[3, 4, 5, 6], [7, 8]], [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12]], [[5] * 9]]
    rows = [PackedRows.build(batch, [[True] * len(row) for row in batch]) for batch in batches]
    want = [packed_loss(model, r).item() for r in rows]
    want_grads = torch.autograd.grad(packed_loss(model, rows[1]), list(model.parameters()))
    assert kernels.compile_layers(model, keep=keep) == 4
    got = [packed_loss(model, r).item() for r in rows]
    assert got == pytest.approx(want, rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(packed_loss(model, rows[1]), list(model.parameters())), want_grads, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    frames = compilations.frame_count
    assert frames <= 3  # with a packed mask and without, and a shape that had to be told apart: not 4 layers x 3 shapes
    rollouts = GraphEngine(model).generate([[3, 4]], SamplingParams(max_new_tokens=3, temperature=0))
    assert len(rollouts.completion_ids[0]) == 3
    assert compilations.frame_count == frames  # rollouts run the plain layers
    assert packed_loss(model, rows[0]).item() == pytest.approx(want[0], rel=1e-5)
    kernels.restore_layers(model)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_stays_whole_under_ddp(compilations, monkeypatch, whole):
    """Else the compiler ends a graph wherever a bucket of gradients is full; what passes from one to the next is then saved too."""
    from torch.nn.parallel import DistributedDataParallel

    active = types.SimpleNamespace(bucket_bytes_cap=2**20)
    monkeypatch.setattr(DistributedDataParallel, "_get_active_ddp_module", lambda: active)
    wide = SHAPE | {"hidden_size": 256, "intermediate_size": 1024}  # 4 MiB of weights a layer
    model = AutoModelForCausalLM.from_config(Qwen2Config(**wide, vocab_size=61))
    kernels.compile_layers(model)
    if not whole:
        monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    model(torch.tensor([[3, 4, 5]]), use_cache=False).logits.sum().backward()
    assert (compilations.frame_count == 1) is whole


def test_what_is_kept(compilations):
    """`mlp` recomputes the two results that enter the gated MLP, which `cheap` keeps."""
    torch.manual_seed(0)
    wide = SHAPE | {"intermediate_size": 160, "num_hidden_layers": 1}
    kept = {}
    for keep in ("cheap", "mlp"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**wide, vocab_size=61), attn_implementation="sdpa")
        kernels.compile_layers(model, keep=keep)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes = {}

        def see(tensor, own=own, sizes=sizes):
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            model.get_decoder()(input_ids=torch.arange(50)[None], use_cache=False)
        kept[keep] = sum(sizes.values())
    assert kept["cheap"] - kept["mlp"] == 2 * 50 * 160
