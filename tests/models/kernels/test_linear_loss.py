"""The chunked head against the plain one: values and gradients, every option, tied weights, edge cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from aligntune.models.kernels.linear_loss import linear_cross_entropy, linear_log_probs

N, H, V = 13, 8, 37


def head(seed=0, dtype=torch.float32, bias=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=dtype).requires_grad_()
    offset = torch.randn(V, generator=g, dtype=dtype).requires_grad_() if bias else None
    labels = torch.randint(0, V, (N,), generator=g)
    return hidden, weight, offset, labels


def plain_logits(hidden, weight, bias, softcap=None, temperature=1.0):
    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def grads(value, *inputs):
    return torch.autograd.grad(value, [x for x in inputs if x is not None])


def assert_same(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize(("smoothing", "softcap", "temperature"), [(0.0, None, 1.0), (0.2, None, 0.7), (0.1, 3.0, 1.3)])
def test_cross_entropy_equals_torch(reduction, chunk, smoothing, softcap, temperature):
    hidden, weight, bias, labels = head()
    labels[[2, 7]] = -100
    want = F.cross_entropy(
        plain_logits(hidden, weight, bias, softcap, temperature), labels, reduction=reduction, label_smoothing=smoothing
    )
    got = linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        label_smoothing=smoothing,
        softcap=softcap,
        temperature=temperature,
        reduction=reduction,
        chunk_tokens=chunk,
    )
    assert_same([got], [want])
    upstream = torch.linspace(0.5, 2, N) if reduction == "none" else torch.tensor(3.0)
    assert_same(
        grads((got * upstream).sum(), hidden, weight, bias), grads((want * upstream).sum(), hidden, weight, bias)
    )


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (None, 0.6), (2.5, 1.4)])
def test_log_probs_entropy_and_collision_equal_the_plain_ones(chunk, softcap, temperature):
    hidden, weight, bias, labels = head(1)
    log_p = plain_logits(hidden, weight, bias, softcap, temperature).log_softmax(-1)
    want = (log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), log_p.exp().square().sum(-1).log())
    got = linear_log_probs(
        hidden,
        weight,
        labels,
        bias,
        temperature=temperature,
        softcap=softcap,
        entropy=True,
        entropy_grad=True,
        collision=True,
        chunk_tokens=chunk,
    )
    assert_same(got, want)
    for upstream in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.7, -0.4, 1.1)):
        ramp = torch.linspace(-1, 2, N)
        total = [sum((u * x * ramp).sum() for u, x in zip(upstream, xs, strict=True)) for xs in (got, want)]
        assert_same(*(torch.autograd.grad(t, [hidden, weight, bias], retain_graph=True) for t in total))


def test_two_logits_by_hand():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[math.log(3.0)], [0.0]])  # p = (3/4, 1/4)
    got = linear_log_probs(hidden, weight, torch.tensor([0]), entropy=True, collision=True)
    assert got.log_probs.item() == pytest.approx(math.log(0.75))
    assert got.entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert got.log_collision.item() == pytest.approx(math.log(10 / 16))


def test_gradients_against_finite_differences():
    hidden, weight, bias, labels = head(2, torch.float64)
    few = slice(0, 4)

    def everything(h, w, b):
        out = linear_log_probs(
            h, w, labels[few], b, temperature=0.8, softcap=4.0, entropy_grad=True, collision=True, chunk_tokens=3
        )
        return out.log_probs, out.entropy, out.log_collision

    inputs = [x[few].detach().requires_grad_() if x is hidden else x for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(everything, inputs)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels[few], b, label_smoothing=0.1, softcap=4.0, chunk_tokens=3),
        inputs,
    )


def test_entropy_is_a_detached_metric_unless_asked():
    hidden, weight, _, labels = head(bias=False)
    assert not linear_log_probs(hidden, weight, labels, entropy=True).entropy.requires_grad
    assert linear_log_probs(hidden, weight, labels, entropy_grad=True).entropy.requires_grad


def test_tied_weight_collects_both_gradients():
    _, weight, _, labels = head(bias=False)
    tokens = torch.arange(N) % V
    want = grads(F.cross_entropy(F.embedding(tokens, weight) @ weight.T, labels), weight)
    assert_same(grads(linear_cross_entropy(F.embedding(tokens, weight), weight, labels, chunk_tokens=4), weight), want)


@pytest.mark.parametrize("loss", ["cross_entropy", "log_probs"])
def test_frozen_head_gets_no_gradient_work(loss, monkeypatch):
    from aligntune.models.kernels import linear_loss

    hidden, weight, _, labels = head(bias=False)
    weight.requires_grad_(False)
    monkeypatch.setattr(linear_loss, "_add_product", lambda *_: pytest.fail("computed the gradient of a frozen weight"))
    if loss == "cross_entropy":
        linear_cross_entropy(hidden, weight, labels).backward()
    else:
        linear_log_probs(hidden, weight, labels).log_probs.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


@pytest.mark.parametrize(("vocab", "sizes"), [(1024, [300]), (4096, [150, 150]), (16384, [100, 100, 100])])
def test_chunks_are_equal_and_within_the_budget(vocab, sizes, monkeypatch):
    """4 MiB of float32 on a CPU are 1024, 256 and 64 rows of such logits; fewer than 128 are not taken."""
    from aligntune.models.kernels import linear_loss

    found, plain = [], linear_loss.head_logits
    monkeypatch.setattr(
        linear_loss, "head_logits", lambda hidden, *rest: found.append(len(hidden)) or plain(hidden, *rest)
    )
    linear_log_probs(torch.randn(300, 2), torch.randn(vocab, 2), torch.zeros(300, dtype=torch.long))
    assert found == sizes


def test_only_the_head_trains():
    hidden, weight, _, labels = head(bias=False)
    want = grads(F.cross_entropy(hidden @ weight.T, labels), weight)
    assert_same(grads(linear_cross_entropy(hidden.detach(), weight, labels, chunk_tokens=4), weight), want)
    assert_same(
        grads(-linear_log_probs(hidden.detach(), weight, labels, chunk_tokens=4).log_probs.mean(), weight), want
    )


def test_no_tokens_and_all_ignored_give_zero_loss_and_zero_gradient():
    hidden, weight, _, labels = head(bias=False)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0
    empty = linear_log_probs(hidden[:0], weight, labels[:0], entropy=True)
    assert empty.log_probs.shape == empty.entropy.shape == (0,)
    empty.log_probs.sum().backward()


def test_large_logits_do_not_overflow():
    hidden, weight, _, labels = head(bias=False)
    got = linear_log_probs(hidden * 1e4, weight, labels, entropy=True, collision=True)
    assert all(torch.isfinite(x).all() for x in got)
    torch.testing.assert_close(
        got.log_probs, F.log_softmax(hidden * 1e4 @ weight.T, -1).gather(-1, labels[:, None])[:, 0]
    )


def test_bfloat16_sums_in_float32_and_returns_bfloat16_gradients():
    hidden, weight, _, labels = head(3, torch.bfloat16, bias=False)
    logits = (hidden @ weight.T).float()
    got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.cross_entropy(logits, labels), rtol=1e-5, atol=1e-5)
    dh, dw = grads(got, hidden, weight)
    want = grads(F.cross_entropy(hidden.float() @ weight.float().T, labels), hidden, weight)
    assert dh.dtype == dw.dtype == torch.bfloat16
    assert_same((dh, dw), want, tolerance=2e-2)


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_gradients():
    hidden, weight, _, labels = head(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert loss.item() == rounded.item()
    assert grads(loss, weight)[0].dtype == torch.float32


def test_graph_without_gradients_under_no_grad():
    hidden, weight, _, labels = head(bias=False)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad
        assert not linear_log_probs(hidden, weight, labels).log_probs.requires_grad


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(2, 50),
    st.integers(1, 25),
    st.floats(0.1, 3.0),
    st.integers(0, 10**6),
)
def test_any_shape(tokens, width, vocab, chunk, temperature, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, requires_grad=True)
    weight = torch.randn(vocab, width, generator=g, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    want = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    got = linear_log_probs(hidden, weight, labels, temperature=temperature, chunk_tokens=chunk).log_probs
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    upstream = torch.randn(tokens, generator=g)
    assert_same(grads((got * upstream).sum(), hidden, weight), grads((want * upstream).sum(), hidden, weight), 5e-5)
