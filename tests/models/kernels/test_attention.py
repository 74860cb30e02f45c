"""Packed attention against transformers' own sdpa with its dense mask; what `auto` resolves to and why."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhimoeConfig,
    Qwen3Config,
)

from aligntune.config.sft import ModelConfig
from aligntune.errors import ModelError
from aligntune.models.forward import packed_log_probs
from aligntune.models.kernels.attention import PACKED_SDPA, VARLEN, resolve_attention
from aligntune.models.kernels.documents import Documents, bucketed_attention, documents_of
from aligntune.models.load import load_model
from aligntune.models.packed import PackedRows
from aligntune.models.precision import Precision

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "sliding": MistralConfig(**SHAPE, sliding_window=3),
}
ROWS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]]


def pair(name):
    """The same model with transformers' sdpa and with ours."""
    resolve_attention("auto", "cpu")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").eval()
    for p in plain.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(PACKED_SDPA)
    return plain, ours


@pytest.mark.parametrize("window", [None, 2, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_buckets_equal_a_block_diagonal_mask(window, heads):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 7, 2, 8, 5, 3])
    total = int(lengths.sum())
    q, k, v = (
        torch.randn(total, h, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], heads[1], heads[1])
    )
    row = torch.repeat_interleave(lengths)
    distance = torch.arange(total)[:, None] - torch.arange(total)
    mask = (row[:, None] == row) & (distance >= 0) & (distance < (window or total))
    want = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    got = bucketed_attention(q, k, v, Documents(cu, 8), scale=0.3, window=window)
    torch.testing.assert_close(got, want)
    ramp = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((x * ramp).sum(), [q, k, v]) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_buckets_waste_less_than_half():
    cu = F.pad(torch.tensor([1, 2, 3, 4, 5, 100, 64, 65]).cumsum(0), (1, 0)).int()
    buckets = Documents(cu, 100).buckets()
    assert [b.source.shape for b in buckets] == [(1, 1), (1, 2), (2, 4), (1, 5), (1, 64), (2, 100)]
    assert sum(len(b.target) for b in buckets) == 244


def test_buckets_are_made_once_for_all_layers_and_anew_for_other_boundaries():
    cu = torch.tensor([0, 1, 3, 6])
    first = Documents(cu, 3).buckets()
    assert Documents(cu, 3).buckets() is first
    assert Documents(cu.clone(), 3).buckets() is not first
    first = Documents(cu, 3).buckets()
    cu[1] = 2  # in place
    assert [bucket.target.tolist() for bucket in Documents(cu, 3).buckets()] == [[2], [0, 1], [3, 4, 5]]
    with torch.inference_mode():
        assert len(Documents(torch.tensor([0, 1, 3]), 2).buckets()) == 2


def test_documents_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 0, 1, 2, 3]])
    found = documents_of(positions, 2, 6, positions.device)
    assert found.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 12]
    assert found.max_length == 4
    assert documents_of(positions, 2, 6, positions.device) is found
    assert documents_of(torch.arange(6)[None], 3, 6, positions.device).whole_rows
    assert documents_of(torch.tensor([[0, 1, 0, 1]]), 2, 4, positions.device).cu_seqlens.tolist() == [0, 2, 4, 6, 8]
    assert documents_of(None, 2, 6, positions.device).cu_seqlens.tolist() == [0, 6, 12]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_equal_the_dense_mask(name):
    plain, ours = pair(name)
    rows = PackedRows.build(ROWS, [[True] * len(row) for row in ROWS])
    logits = [
        m(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits for m in (ours, plain)
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    values = [packed_log_probs(m, rows).log_probs for m in (ours, plain)]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(v.sum(), list(m.parameters())) for v, m in zip(values, (ours, plain), strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_no_mask_is_built_for_packed_rows(monkeypatch):
    from aligntune.models.kernels import attention

    monkeypatch.setattr(attention, "sdpa_mask", lambda **_: pytest.fail("built a dense mask"))
    rows = PackedRows.build(ROWS, [[True] * len(row) for row in ROWS])
    _, ours = pair("llama")
    packed_log_probs(ours, rows)
    ours(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_padded_batches_equal_sdpa(name, side):
    plain, ours = pair(name)
    ids = torch.arange(3, 3 + 24).view(3, 8)
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :3], mask[1, :5] = 0, 0
    if side == "right":
        mask[0, 5:], mask[1, 3:] = 0, 0
    logits = [m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (ours, plain)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_equals_sdpa(name, cache):
    plain, ours = pair(name)
    ids = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]])
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    mask = (ids != 0).long()
    got, want = (m.generate(input_ids=ids, attention_mask=mask, **options) for m in (ours, plain))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), VARLEN), ((8, 0), VARLEN), ((7, 5), PACKED_SDPA)])
def test_auto_on_a_gpu_takes_the_flash_kernel_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torch.version.hip", None)
    assert resolve_attention("auto", "cuda")[0] == expected


def test_auto_on_the_cpu_says_why():
    assert resolve_attention("auto", "cpu") == (
        PACKED_SDPA,
        "the device is cpu; plain torch, packed documents without a mask",
    )
    assert resolve_attention("eager", "cpu")[0] == "eager"


def test_what_our_kernels_lack_is_left_to_transformers_or_refused():
    gemma = Gemma2Config(attn_logit_softcapping=50.0)
    name, why = resolve_attention("auto", "cpu", gemma)
    assert name == "eager"
    assert "soft-capping" in why
    with pytest.raises(ModelError, match="soft-capping"):
        resolve_attention(PACKED_SDPA, "cpu", gemma)
    with pytest.raises(ModelError, match="the device is cpu"):
        resolve_attention(VARLEN, "cpu")


@pytest.mark.parametrize(("lacks", "own"), [("_supports_sdpa", "eager"), ("_supports_attention_backend", "sdpa")])
def test_models_with_attention_of_their_own_are_loaded_with_it(lacks, own, tmp_path, monkeypatch):
    """As MPT and Falcon have, for example."""
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, lacks, False)
    precision = Precision(torch.float32)
    model = load_model(ModelConfig(name_or_path=str(tmp_path)), precision, trained=False)
    assert model.config._attn_implementation == own


def test_what_a_class_cannot_run_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    with pytest.raises(ModelError, match="cannot run LlamaForCausalLM"):
        resolve_attention(PACKED_SDPA, "cpu", model_class=LlamaForCausalLM)
    assert resolve_attention("sdpa", "cpu", model_class=LlamaForCausalLM)[0] == "sdpa"
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with pytest.raises(ModelError, match="'sdpa' cannot run LlamaForCausalLM: use 'auto' or 'eager'"):
        resolve_attention("sdpa", "cpu", model_class=LlamaForCausalLM)
    assert resolve_attention("eager", "cpu", model_class=LlamaForCausalLM)[0] == "eager"


def test_windows_that_only_the_mask_knows_are_left_to_transformers():
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    assert resolve_attention("auto", "cpu", PhimoeConfig(**shape, sliding_window=12))[0] == "sdpa"
    assert resolve_attention("auto", "cpu", PhimoeConfig(**shape, sliding_window=64))[0] == PACKED_SDPA
