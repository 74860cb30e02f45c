"""The formulas of memory: held to what autograd really saves, to the constants of the code they describe, and to sums by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aligntune.config.base import LoraSettings
from aligntune.config.optimizers import SPLIT_OPTIMIZERS
from aligntune.models.forward import causal_model, trunk_hidden, use_padding
from aligntune.models.kernels import compile as kernels
from aligntune.models.kernels import linear_loss
from aligntune.models.lora import add_lora
from aligntune.models.packed import PackedRows
from aligntune.planning import memory, situation
from aligntune.planning.memory import GIB, Batch, Rollout, Training, layer_bytes, moments, peak
from aligntune.planning.shapes import FAMILIES, Shape, shape_of
from aligntune.rollouts import graph

BF16, FP32 = torch.bfloat16, torch.float32
SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
                         "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small(kind: str) -> Shape:
    return shape_of(SIZES | {"model_type": kind, "num_hidden_layers": 2}, kind)


@contextmanager
def counting() -> Iterator[dict[int, int]]:
    """Storage -> bytes of what autograd saves meanwhile."""
    found: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # or its place in memory is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def made(
    kind: str,
    layers: int,
    dtype: torch.dtype,
    attention: str,
    lora: list[str] | None,
    padded: bool,
    checkpointing: bool,
) -> Any:
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()
    if lora is not None:
        model = add_lora(model, LoraSettings(8, 16, 0.0, lora, True))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if padded:
        use_padding(model)
    return model


def saved(model: Any, tokens: int, rows: int, autocast: bool) -> int:
    """Bytes that a forward pass saves besides weights: `rows` rows, the longest of `tokens`."""
    lengths = [tokens - row for row in range(rows)]
    packed = PackedRows.build([[5] * length for length in lengths], [[True] * length for length in lengths])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with counting() as found, torch.autocast("cpu", BF16, enabled=autocast):
        trunk_hidden(model, packed)
    return sum(size for place, size in found.items() if place not in weights)


def measured(kind: str, rows: int, *, autocast: bool, **how: Any) -> float:
    """Bytes for one token in one layer at 100 tokens a row. What a layer saves is constant + linear * tokens + square * tokens**2,
    told apart by three lengths: copies of weights are the constant, masks and scores the square."""
    less, more = (made(kind, layers, **how) for layers in (2, 3))
    layer = {
        tokens: saved(more, tokens, rows, autocast) - saved(less, tokens, rows, autocast) for tokens in (50, 100, 150)
    }
    square = (layer[150] - 2 * layer[100] + layer[50]) / (2 * 50**2)
    linear = (layer[100] - layer[50]) / 50 - square * 150
    return (linear + square * 100) / rows


CASES = {
    "all weights, autocast": ("qwen2", {}, {}),
    "all weights, bf16": ("qwen2", {"autocast": False, "dtype": BF16}, {"trained": 2}),
    "all weights, fp32": ("qwen2", {"autocast": False}, {"compute": 4}),
    "all weights, autocast, padded with a mask": ("qwen2", {"padded": True}, {}),
    "all weights, autocast, eager": ("qwen2", {"attention": "eager"}, {"eager": True}),
    "norms of queries and keys": ("qwen3", {}, {}),
    "norms of all queries and keys": ("olmo2", {}, {}),
    "four norms": ("gemma3_text", {}, {}),
    "soft-capping": ("gemma2", {"attention": "eager"}, {"eager": True}),
    "fused matrices": ("phi3", {}, {}),
    "LayerNorm, plain feed-forward": ("gpt_neox", {}, {}),
    "llama": ("llama", {}, {}),
    "LoRA on queries": ("qwen2", {"dtype": BF16, "lora": ["q_proj"]}, {}),
    "LoRA on queries and down": ("qwen2", {"dtype": BF16, "lora": ["q_proj", "down_proj"]}, {}),
    "LoRA everywhere": ("qwen2", {"dtype": BF16, "lora": ALL}, {}),
    "LoRA everywhere, padded": ("qwen2", {"dtype": BF16, "lora": ALL, "padded": True}, {}),
}


LOOSE = {"phi3": 0.05, "gpt_neox": 0.06}
"""Phi3 has dropout of 0 that saves masks; GPT-NeoX turns a part of each head only."""


@pytest.mark.parametrize("case", CASES)
def test_activations_are_those_that_autograd_saves(case: str) -> None:
    kind, how, model = CASES[case]
    how = {
        "autocast": True,
        "dtype": FP32,
        "attention": "sdpa",
        "lora": None,
        "padded": False,
        "checkpointing": False,
    } | how
    rows = 2 if how["padded"] else 1
    lora = None if how["lora"] is None else LoraSettings(8, 16, 0.0, how["lora"], True)
    batch = Batch(100 * rows, 0, 100, masked=how["padded"])
    predicted = layer_bytes(Training(small(kind), batch, "none", lora, **model))
    assert predicted == pytest.approx(measured(kind, rows, **how), rel=LOOSE.get(kind, 0.02))


@pytest.mark.parametrize(("how", "bytes_each"), [({}, 4), ({"autocast": False, "dtype": BF16}, 2)])
def test_checkpointing_saves_the_input_of_each_layer(how: dict[str, Any], bytes_each: int) -> None:
    how = {
        "autocast": True,
        "dtype": FP32,
        "attention": "sdpa",
        "lora": None,
        "padded": False,
        "checkpointing": True,
    } | how
    assert measured("qwen2", 1, **how) == bytes_each * 64
    training = Training(small("qwen2"), Batch(100, 0, 100), "none", trained=bytes_each, checkpointing=True)
    assert memory.saved_bytes(training) == 2 * 100 * bytes_each * 64


COMPILED = [("qwen2", "half", None), ("qwen2", "all", None), ("qwen2", "all", ALL), ("gemma3_text", "all", None),
            ("gemma3_text", "half", None), ("phi3", "half", None), ("qwen2", "cheap", ALL), ("qwen2", "half", ALL), ("qwen2", "mlp", ALL)]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "keep", "lora"), [COMPILED[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED[1:])]
)
def test_compiled_layers_keep_what_is_planned(
    kind: str, keep: Any, lora: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the partitioner that compiling for a GPU goes by, without its code. Two lengths tell tokens from copies of weights."""
    torch._dynamo.reset()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: plain(f, backend="aot_eager_decomp_partition", **k))
    kernels._compiled_for_training.cache_clear()
    monkeypatch.setitem(SIZES, "intermediate_size", 208)
    monkeypatch.setitem(SIZES, "head_dim", 24)
    layer = {}
    less, more = (made(kind, layers, BF16 if lora else FP32, "sdpa", lora, False, False) for layers in (2, 3))
    for model in (less, more):
        kernels.compile_layers(causal_model(model), keep=keep)
        if lora:  # the first layer's input too has a gradient, as the others' have: one compilation
            causal_model(model).enable_input_require_grads()
    for tokens in (50, 150):
        layer[tokens] = saved(more, tokens, 1, True) - saved(less, tokens, 1, True)
    kernels._compiled_for_training.cache_clear()
    settings = None if lora is None else LoraSettings(8, 16, 0.0, lora, True)
    predicted = layer_bytes(Training(small(kind), Batch(100, 0, 100), "none", settings, compiled=keep))
    loose = 0.04 if (kind, keep) == ("gemma3_text", "all") else 1e-6
    assert predicted == pytest.approx((layer[150] - layer[50]) / 100, rel=loose)


def test_selective_checkpointing_by_hand() -> None:
    """H 896, I 4864, Q 896, K 128, 14 heads; masters in float32 unless LoRA."""
    each = {keep: layer_bytes(replace(QWEN_PACKED, compiled=keep)) for keep in ("cheap", "half", "mlp")}
    mlp = 4 * 896 + 2 * (896 + 2 * 128) + 2 * 896 + 4 * 14 + 2 * 896  # input; q, k, v; attention, log-sums; o
    assert each == {"mlp": mlp, "half": mlp + 2 * 4864, "cheap": mlp + 4 * 4864}
    normed = replace(QWEN_PACKED, compiled="mlp", shape=replace(QWEN.shape, family=FAMILIES["olmo2"]))
    assert layer_bytes(normed) == mlp + 2 * 896  # down's result is normed
    # Of LoRA's products the first of each pair; the second is computed again.
    lora = replace(
        QWEN_PACKED, compiled="half", lora=LoraSettings(16, 32, 0.0, ["q_proj", "up_proj", "down_proj"], True)
    )
    assert layer_bytes(lora) == mlp - 2 * 896 + 2 * 4864 + 2 * 3 * 16
    assert layer_bytes(replace(lora, compiled="mlp")) == mlp - 2 * 896 + 2 * 3 * 16
    assert layer_bytes(replace(lora, compiled="cheap")) < layer_bytes(replace(lora, compiled="all"))
    lora = replace(lora, lora=LoraSettings(16, 32, 0.0, ["q_proj", "down_proj"], True))
    # The compiler: input, attention, results of o, gate and up, norms; inputs of q and down, and a rank for each.
    common = 2 * 896 + 2 * (2 * 896 + 2 * 128) + 4 * 14 + 2 * (896 + 2 * 4864) + 4 * 2
    assert layer_bytes(replace(lora, compiled="all")) == common + 2 * (896 + 4864) + 2 * 2 * 16


def test_moments_of_compiled_layers() -> None:
    t, embedding = replace(QWEN_PACKED, compiled="mlp"), 151_936 * 896
    found, matrices = moments(t), QWEN.shape.layer_matrices
    assert found["end of the forward pass"]["bf16 copies of weights"] == 2 * embedding  # of the head alone
    whole = layer_bytes(replace(t, compiled="all"))
    again = found["backward pass of the last layer"]
    assert again["recomputed of a layer"] == 16_384 * (whole - layer_bytes(t)) + 2 * matrices
    assert again["activations"] == 24 * 16_384 * layer_bytes(t)
    assert again["gradients within a layer"] == 16_384 * 3 * 4864 * 2  # of gate, up and their product
    pairs = LoraSettings(16, 32, 0.0, ["q_proj", "gate_proj", "down_proj"], True)
    within = moments(replace(t, lora=pairs))["backward pass of the last layer"]["gradients within a layer"]
    assert (
        within == 16_384 * (3 + 2 + 1) * 4864 * 2
    )  # the pair's result and gradient at gate, its gradient at the product
    kept = moments(replace(t, compiled="all"))["start of the backward pass"]
    assert kept["bf16 copies of weights"] == 2 * (embedding + 24 * matrices)
    sizes = [peak(replace(QWEN_PACKED, compiled=keep)) for keep in ("mlp", "half", "cheap", "all", None)]
    assert sizes == sorted(sizes)


def test_split_weights_by_hand() -> None:
    """bfloat16 weight 2, rest 2, gradient 2, moments 4 + 4 or 2 + 2 bytes; nothing is cast."""
    n = 494_032_768
    for name, moment in (("adamw_split", 4), ("adamw_split_bf16", 2)):
        t = replace(QWEN_PACKED, optimizer=name, trained=2)
        assert moments(t)["optimiser step"] == {
            "weights": 2 * n,
            "optimiser states": (2 + 2 * moment) * n,
            "gradients": 2 * n,
        }
        assert "bf16 copies of weights" not in moments(t)["end of the forward pass"]


def test_rollouts_hold_rounded_weights() -> None:
    n, line = 494_032_768, "rounded weights for rollouts"
    online = replace(QWEN, rollout=Rollout(128, 384, 128 * 128))
    assert moments(online)["optimiser step"][line] == 2 * n
    assert moments(online)["rollout"]["rollout cache"] == 2 * 24 * 128 * 2 * 128 * 384  # not that of float32 masters
    lora = replace(online, lora=LoraSettings(16, 32, 0.0, ["q_proj"], True))
    adapter = 24 * 16 * (896 + 896)
    assert moments(lora)["rollout"][line] == 2 * adapter
    rest = n - 24 * QWEN.shape.layer_matrices
    assert moments(replace(lora, quantised="4bit"))["rollout"][line] == 2 * (adapter + rest)
    for same in ({"trained": 2, "optimizer": "adamw_split"}, {"compute": 4}):
        assert line not in moments(replace(online, **same))["rollout"]


def test_constants_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear_loss.CHUNK_BYTES["cuda"] == memory.CHUNK
    assert graph.PREFILL_TOKENS == memory.PREFILL
    assert situation.MOST_ROWS == graph.MOST_ROWS
    assert set(get_args(memory.Keep)) == set(kernels._CONTEXTS)
    assert set(memory.OPTIMIZERS) >= set(SPLIT_OPTIMIZERS)
    monkeypatch.setitem(linear_loss.CHUNK_BYTES, "meta", memory.CHUNK)
    for predicted, vocab in ((5000, 151936), (7, 151936), (20_000, 32_000), (10, 50_000_000)):
        hidden, weight = torch.empty(predicted, 1, device="meta"), torch.empty(vocab, 1, device="meta")
        assert linear_loss._Plan.of(hidden, weight, None, False).tokens == memory.chunk_tokens(predicted, vocab)


def test_tiles_are_those_of_trl() -> None:
    chunked_logprob = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL before 1.15 has another head")
    from trl.trainer import utils

    assert (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == memory.TILE


def test_a_step_by_hand() -> None:
    """Qwen2.5-0.5B, all weights, 8 rows of 2,048 tokens on TRL, checkpointed: the peak is at the end of the backward pass."""
    n, embedding = 494_032_768, 151_936 * 896
    layer = 16_384 * layer_bytes(QWEN) + 2 * (896 * (2 * 896 + 2 * 128) + 3 * 896 * 4864)
    assert moments(QWEN)["end of the backward pass"] == {
        "weights": 4 * n, "optimiser states": 8 * n, "gradients": 4 * n, "activations of a layer": layer, "gradient of the embedding": 4 * embedding,
    }  # fmt: skip
    # norms 2 (4 + 4) H, casts for five matrices 2 H each, 4 Q of attention in 2 bytes, log-sums, mask 2 L, feed-forward 4 x 2 I
    assert layer_bytes(QWEN) == 16 * 896 + 10 * 896 + 8 * 896 + 4 * 14 + 2 * 2048 + 8 * 4864
    assert peak(QWEN) == 16 * n + layer + 4 * embedding
    step = moments(replace(QWEN, optimizer="adamw_torch"))["optimiser step"]
    assert step == {"weights": 4 * n, "optimiser states": 8 * n, "gradients": 4 * n, "temporaries": 4 * n}


def test_weights_and_states() -> None:
    n, embedding = 494_032_768, 151_936 * 896
    matrices = 24 * (896 * (2 * 896 + 2 * 128) + 3 * 896 * 4864)
    lora = LoraSettings(16, 32, 0.0, ["q_proj"], True)
    adapter = 24 * 16 * (896 + 896)
    small = replace(QWEN, lora=lora)
    assert memory.weight_bytes(small) == 2 * n + 4 * adapter
    assert memory.optimizer_bytes(small) == 8 * adapter
    assert memory.weight_bytes(replace(small, quantised="4bit")) == matrices * 0.5625 + 4 * (n - matrices) + 4 * adapter
    assert memory.weight_bytes(replace(small, quantised="8bit")) == matrices + 4 * (n - matrices) + 4 * adapter
    four = replace(small, quantised="4bit", head="loss")
    assert (
        memory.saved_bytes(four) == 24 * 16_384 * 4 * 896
    )  # float32 inputs of checkpointed layers, since embeddings are
    assert moments(four)["end of the forward pass"]["bf16 copies of weights"] == 2 * embedding
    assert memory.optimizer_bytes(replace(QWEN, optimizer="sgd")) == 0
    assert memory.optimizer_bytes(replace(QWEN, optimizer="adamw_8bit")) == pytest.approx(
        2.032 * (n - embedding) + 8 * embedding
    )
    sharded = moments(replace(QWEN, weight_shards=4, state_shards=4))["optimiser step"]
    assert sharded == {"weights": n, "optimiser states": 2 * n, "gradients": n}


def test_rollouts_by_hand() -> None:
    training = replace(QWEN, lora=LoraSettings(16, 32, 0.0, ["q_proj"], True), rollout=Rollout(128, 384, 128 * 128))
    found = moments(training)["rollout"]
    assert found["rollout cache"] == 2 * 24 * 128 * 2 * 128 * 384
    assert found["rollout logits"] == 2 * 4 * 151_936 * 128
    assert found["reading prompts"] == 16_384 * (4 * 4864 * 2 + 896 * 6)


def test_what_each_setting_does_to_the_peak() -> None:
    """Directions that hold whatever the numbers."""
    long = replace(QWEN, checkpointing=False)
    assert peak(long) > peak(QWEN)
    assert peak(replace(long, batch=replace(long.batch, tokens=8192))) < peak(long)
    assert peak(replace(long, eager=True)) > peak(long)
    assert peak(replace(long, head="full")) - peak(long) > 10 * 16_384 * 151_936
    assert peak(replace(long, value=QWEN.shape)) > peak(long) + 12 * QWEN.shape.parameters
    assert peak(replace(long, frozen={"reference": 3.0 * GIB})) == peak(long) + 3 * GIB
    assert peak(replace(long, accumulates=True)) == peak(long) + 4 * QWEN.shape.parameters
    assert peak(replace(long, bucketed=True)) == peak(long) + 4 * QWEN.shape.parameters
    assert moments(replace(long, bucketed=True))["optimiser step"] == moments(long)["optimiser step"]


QWEN = Training(
    shape_of({"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}, "qwen"),
    Batch(16_384, 16_384, 2048, masked=True), "tiles", optimizer="adamw_torch_fused", checkpointing=True,
)  # fmt: skip
QWEN_PACKED = replace(QWEN, batch=Batch(16_384, 16_384, 2048), head="loss", checkpointing=False)
