"""Layers that read one input are one product: with the trainer's weights in place, and only where that is what the model computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoConfig, AutoModelForCausalLM

from aligntune.config.base import LoraSettings
from aligntune.models.forward import causal_model
from aligntune.models.kernels import compile as kernels
from aligntune.models.kernels.joined import joined, lay_together
from aligntune.models.lora import add_lora
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.graph import GraphEngine

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.arange(12)[None]


def made(kind: str = "qwen2", lora: bool = False, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if lora:
        model = add_lora(model, LoraSettings(4, 8, 0.0, ["q_proj", "v_proj", "gate_proj"], True)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "lora"), [("qwen2", False), ("qwen2", True), ("llama", False), ("qwen3", False), ("gemma3_text", False)]
)
def test_logits_stay(kind: str, lora: bool) -> None:
    model = made(kind, lora)
    causal, want, names = causal_model(model), logits(model), list(model.state_dict())
    assert lay_together(causal) == 6
    torch.testing.assert_close(logits(model), want)
    products = []
    hook = torch.nn.functional.linear
    with joined(causal), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "linear", lambda *given: products.append(tuple(given[1].shape)) or hook(*given)
        )
        torch.testing.assert_close(logits(model), want)
    assert products.count((32 + 16 + 16, 32)) == 3  # q, k and v of each layer
    assert products.count((64 + 64, 32)) == 3
    assert "forward" not in vars(causal.get_decoder().layers[0].mlp.up_proj)
    assert list(model.state_dict()) == names


def test_what_is_trained_is_what_is_multiplied() -> None:
    """Weights stay parameters of their own: an optimiser made before sees them, and what it writes is in the product."""
    model, plain = made(), made()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (model, plain)]
    lay_together(model)
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        each(IDS, labels=IDS).loss.backward()
        optimizer.step()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    assert lay_together(model) == 6
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    with joined(model):
        torch.testing.assert_close(logits(model), logits(plain))


def test_a_saved_model_a_copy_and_a_loaded_state_are_whole(tmp_path: Path) -> None:
    model = made()
    want = logits(model)
    lay_together(model)
    model.save_pretrained(tmp_path / "model")
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.2)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), want)
    torch.testing.assert_close(logits(copy.deepcopy(model)), want)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(state)
    with joined(model):
        torch.testing.assert_close(logits(model), want)


def test_weights_that_were_moved_apart_are_not_joined() -> None:
    model = made()
    lay_together(model)
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.data = attention.k_proj.weight.data.clone()
    want = logits(model)
    with joined(model):
        assert "forward" not in vars(attention.q_proj)
        assert "forward" in vars(model.model.layers[1].self_attn.q_proj)
        torch.testing.assert_close(logits(model), want)


def test_weights_in_a_buffer_of_somebody_elses_stay_there() -> None:
    """DeepSpeed writes into its flat buffer, of which the weights are windows."""
    model = made()
    flat = torch.cat([parameter.data.flatten() for parameter in model.parameters()])
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter, window in zip(model.parameters(), flat.split(sizes), strict=True):
        parameter.data = window.view(parameter.shape)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    assert lay_together(model) == 3  # gate and up lie together by chance; between q and k there is a bias
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    want = logits(model)
    with joined(model):
        torch.testing.assert_close(logits(model), want)


def test_pieces_of_memory_that_touch_are_laid_together() -> None:
    model = made()
    mlp = model.model.layers[0].mlp
    memory, size = bytearray(2 * 64 * 32 * 4), 64 * 32
    for place, linear in enumerate((mlp.gate_proj, mlp.up_proj)):
        own = torch.frombuffer(memory, dtype=torch.float32, count=size, offset=place * size * 4).view(64, 32)
        linear.weight.data = own.copy_(linear.weight.data)
    assert mlp.gate_proj.weight.data_ptr() + size * 4 == mlp.up_proj.weight.data_ptr()
    want = logits(model)
    assert lay_together(model) == 6
    with joined(model):
        torch.testing.assert_close(logits(model), want)


def test_the_engine_decodes_by_joint_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    lay_together(model)
    widths, plain = set(), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: widths.add(len(given[1])) or plain(*given))
    GraphEngine(model).generate([[3, 4, 5]], SamplingParams(max_new_tokens=3, seed=0))
    assert {32 + 16 + 16, 64 + 64} <= widths


def test_layers_called_with_other_inputs_compute_their_own() -> None:
    model = made()
    attention = model.model.layers[0].self_attn
    lay_together(model)
    one, other = torch.randn(2, 5, 32)
    with torch.no_grad():
        want = attention.k_proj(other), attention.v_proj(one)
        with joined(model):
            attention.q_proj(one)
            torch.testing.assert_close(attention.k_proj(other), want[0])
            torch.testing.assert_close(attention.v_proj(one), want[1])


def test_what_cannot_lie_together_is_left() -> None:
    model = made()
    first, second, third = (layer.mlp for layer in model.model.layers)
    first.gate_proj.half()
    second.gate_proj.weight = second.up_proj.weight
    third.gate_proj = torch.nn.Sequential(third.gate_proj)
    assert lay_together(model) == 3  # attention's


def test_attention_that_is_not_of_one_kind_is_left() -> None:
    model = made()
    first, second, third = (layer.self_attn for layer in model.model.layers)
    hooked = add_hook_to_module(first.k_proj, ModelHook()).forward
    second.q_proj.bias = None
    third.q_proj.weight.data = third.q_proj.weight.data.t().contiguous().t()
    want = logits(model)
    assert lay_together(model) == 3  # the MLPs'
    with joined(model):
        torch.testing.assert_close(logits(model), want)
    assert first.k_proj.forward is hooked


def test_windows_that_kernels_could_not_read_are_not_made() -> None:
    model = made(head_dim=2, num_key_value_heads=1)  # a bias of k is 8 bytes long
    assert lay_together(model) == 3  # the MLPs'


@pytest.mark.parametrize("lora", [False, True])
def test_all_layers_share_one_compilation(monkeypatch: pytest.MonkeyPatch, lora: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: plain(f, backend=counter, **k))
    kernels._compiled_for_decoding.cache_clear()
    model = made(lora=lora)
    causal, want = causal_model(model), logits(model)
    lay_together(causal)
    with joined(causal), kernels.decoding_layers(causal, compiled=True):
        torch.testing.assert_close(logits(model), want)
    kernels._compiled_for_decoding.cache_clear()
    assert counter.frame_count == 1
    products = [node for node in counter.graphs[0].graph.nodes if "linear" in str(node.target)]
    assert len(products) == 4 + (6 if lora else 0)  # q k v, o, gate up, down; two for each adapter
