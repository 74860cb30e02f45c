"""The CUDA kernels against plain torch: chunked head, varlen attention, decode attention, the draw of a token."""

import copy

import pytest
import torch
from torch.nn import functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {
    "vocab_size": 997, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def head(dtype, tokens=300, width=64, vocab=5003):
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, device="cuda", dtype=torch.float64).to(dtype)
        for shape in ((tokens, width), (vocab, width), (vocab,))
    )
    labels = torch.randint(0, vocab, (tokens,), generator=g, device="cuda")
    return [x.requires_grad_() for x in (hidden / 4, weight, bias)], labels


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("softcap", "temperature", "smoothing"), [(None, 1.0, 0.0), (5.0, 0.7, 0.1)])
def test_cross_entropy(dtype, tolerance, softcap, temperature, smoothing):
    from aligntune.models.kernels.linear_loss import linear_cross_entropy

    (hidden, weight, bias), labels = head(dtype)
    labels[::7] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*exact)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    want = F.cross_entropy(logits / temperature, labels, label_smoothing=smoothing)
    got = linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        softcap=softcap,
        temperature=temperature,
        label_smoothing=smoothing,
        chunk_tokens=70,
    )
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    pairs = zip(torch.autograd.grad(got, [hidden, weight, bias]), torch.autograd.grad(want, exact), strict=True)
    assert max(relative(a, b) for a, b in pairs) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (5.0, 0.7)])
def test_log_probs_entropy_collision(dtype, tolerance, softcap, temperature):
    from aligntune.models.kernels.linear_loss import linear_log_probs

    (hidden, weight, bias), labels = head(dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = F.linear(*exact)
    log_p = ((softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature).log_softmax(-1)
    want = log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), log_p.exp().square().sum(-1).log()
    options = {"softcap": softcap, "temperature": temperature, "entropy_grad": True, "collision": True}
    got = linear_log_probs(hidden, weight, labels, bias, chunk_tokens=70, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    ramp = torch.linspace(-1, 2, len(labels), device="cuda")
    total = [(x[0] * ramp + 0.3 * x[1] - 0.7 * x[2]).sum() for x in (got, want)]
    pairs = zip(
        torch.autograd.grad(total[0], [hidden, weight, bias]), torch.autograd.grad(total[1], exact), strict=True
    )
    assert max(relative(a, b) for a, b in pairs) < tolerance


def models(name, dtype):
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

    from aligntune.models.kernels.attention import resolve_attention

    configs = {
        "llama": LlamaConfig(**SHAPE),
        "qwen2": Qwen2Config(**SHAPE),
        "sliding": MistralConfig(**SHAPE, sliding_window=7),
    }
    implementation, _ = resolve_attention("auto", "cuda", configs[name])
    assert implementation in ("aligntune_varlen", "flash_attention_2")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(configs[name], attn_implementation="sdpa")
    for p in plain.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    plain = plain.cuda().to(dtype)
    ours = copy.deepcopy(plain)
    ours.set_attn_implementation(implementation)
    return plain, ours


def packed_rows():
    from aligntune.models.packed import PackedRows

    g = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 997, (n,), generator=g).tolist() for n in (1, 5, 40, 33, 128, 7, 90)]
    return PackedRows.build(rows, [[True] * len(row) for row in rows], "cuda")


@pytest.mark.parametrize("name", ["llama", "qwen2", "sliding"])
@pytest.mark.parametrize("compiled", [False, True])
def test_varlen_training_step(name, compiled):
    """bfloat16 varlen is no further from float64 than bfloat16 sdpa with its dense mask is."""
    from aligntune.models.forward import packed_loss
    from aligntune.models.kernels.compile import compile_layers

    plain, ours = models(name, torch.bfloat16)
    exact = copy.deepcopy(plain).double()
    if compiled:
        compile_layers(ours)
    rows = packed_rows()
    losses, grads = [], []
    for model in (exact, plain, ours):
        loss = packed_loss(model, rows)
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[2] == pytest.approx(losses[0], rel=2e-3)
    far, near = ([relative(a, b) for a, b in zip(g, grads[0], strict=True)] for g in (grads[2], grads[1]))
    assert max(far) < 1.5 * max(near) + 0.01


@pytest.mark.parametrize("name", ["llama", "sliding"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_varlen_padded_batches_and_generation(name, side):
    plain, ours = models(name, torch.float32)
    ids = torch.randint(3, 997, (3, 24), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, slice(0, 9) if side == "left" else slice(15, None)] = 0
    logits = [m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (ours, plain)]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    if side == "left":
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert ours.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()


def test_a_step_waits_for_the_device_nowhere():
    from aligntune.models.forward import packed_log_probs, packed_loss

    _, ours = models("qwen2", torch.bfloat16)
    rows = packed_rows()
    packed_loss(ours, rows).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_loss(ours, rows).backward()
        packed_log_probs(ours, rows, entropy=True).log_probs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window", [0, 5, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 64), (8, 8, 80), (32, 1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention(window, heads, kv_heads, size, dtype):
    from aligntune.models.kernels.decode_triton import decode_attention

    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda").to(dtype)

    rows, length = 9, 300
    positions = torch.tensor([0, 1, 63, 64, 65, 127, 200, 256, 299], device="cuda")
    keys, values = normal(rows + 2, kv_heads, length, size), normal(rows + 2, kv_heads, length, size)
    q, k, v = normal(rows, heads, size), normal(rows, kv_heads, size), normal(rows, kv_heads, size)
    all_keys, all_values = keys.clone(), values.clone()
    at = torch.arange(rows, device="cuda")
    all_keys[at, :, positions], all_values[at, :, positions] = k, v
    place = torch.arange(length, device="cuda")
    mask = (place <= positions[:, None]) & (place > positions[:, None] - (window or 10**6))
    want = F.scaled_dot_product_attention(
        *(x.double() for x in (q[:, :, None], all_keys[:rows], all_values[:rows])),
        attn_mask=mask[:, None, None],
        scale=0.1,
        enable_gqa=True,
    )[:, :, 0]
    got = decode_attention(q, k, v, keys, values, positions, 0.1, window)
    assert relative(got, want) < (1e-5 if dtype == torch.float32 else 6e-3)
    assert torch.equal(keys, all_keys)
    assert torch.equal(values, all_values)


def test_draws_follow_the_distribution_and_depend_on_the_row_alone():
    from aligntune.models.kernels.decode_triton import draw_rows

    p = torch.tensor([0.5, 0.3, 0.15, 0.049, 0.001], device="cuda")
    n = 100_000
    scores = (p.log() + 3).repeat(n, 1)
    seed, rows, step = (
        torch.tensor([5], device="cuda"),
        torch.arange(n, device="cuda"),
        torch.tensor([2], device="cuda"),
    )
    tokens, log_probs = draw_rows(scores, seed, rows, step, False)
    share = torch.bincount(tokens, minlength=5) / n
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()
    torch.testing.assert_close(log_probs, p.log()[tokens], rtol=1e-5, atol=1e-5)
    some = torch.tensor([70_000, 3, 999], device="cuda")
    assert draw_rows(scores[:3], seed, some, step, False)[0].tolist() == tokens[some].tolist()
    assert draw_rows(scores[:64], seed, rows[:64], step + 1, False)[0].tolist() != tokens[:64].tolist()
    assert draw_rows(scores[:2], seed, rows, step, True)[0].tolist() == [0, 0]


def test_draw_over_a_large_vocabulary():
    from aligntune.models.kernels.decode_triton import draw_rows

    scores = torch.zeros(4096, 151_936, device="cuda")
    scores[:, ::2] = -torch.inf
    tokens, log_probs = draw_rows(
        scores,
        torch.tensor([1], device="cuda"),
        torch.arange(4096, device="cuda"),
        torch.tensor([0], device="cuda"),
        False,
    )
    assert (tokens % 2 == 1).all()
    assert len(tokens.unique()) > 3900  # 4096 draws among 75,968: about 109 pairs meet
    mean = tokens.double().mean().item() / 151_936
    assert mean == pytest.approx(0.5, abs=4 * (1 / 12 / 4096) ** 0.5)
    torch.testing.assert_close(log_probs, torch.full_like(log_probs, 75_968.0).log().neg(), rtol=1e-5, atol=1e-5)
