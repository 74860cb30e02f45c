"""The CUDA kernel behind `logit_rows`: one program a row, statistics and gradient in one launch."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aligntune.models.kernels.logit_rows import RowGrads, RowMath, RowStats

BLOCK, WARPS = 4096, 8


@triton.jit
def _scale(x, inv_temperature, softcap, SOFTCAP: tl.constexpr):  # noqa: ANN202  (a device function)
    """Returns (y, dy/dx)."""
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0)
        return softcap * tanh * inv_temperature, (1.0 - tanh * tanh) * inv_temperature
    else:
        return x * inv_temperature, inv_temperature


@triton.jit
def _logit_rows_kernel(
    logits, row_stride, out, out_stride, targets, log_prob_ptr, lse_ptr, entropy_ptr, collision_ptr,
    g_log_prob, g_entropy, g_collision, inv_temperature, softcap, smoothing, vocab: tl.constexpr,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr,
    STATS: tl.constexpr, GRAD: tl.constexpr, G_ENTROPY: tl.constexpr, G_COLLISION: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * row_stride
    if STATS:
        top = -float("inf")
        total = 0.0  # sum exp(y - top)
        weighted = 0.0  # sum exp(y - top) * (y - top)
        squares = 0.0  # sum exp(2 (y - top))
        plain = 0.0  # sum y
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocab
            y, _ = _scale(
                tl.load(logits + column, mask=inside, other=0.0).to(tl.float32), inv_temperature, softcap, SOFTCAP
            )
            if SMOOTHING:
                plain += tl.sum(tl.where(inside, y, 0.0))
            y = tl.where(inside, y, -float("inf"))
            new_top = tl.maximum(top, tl.max(y))
            decay = tl.exp(top - new_top)
            e = tl.exp(y - new_top)
            if ENTROPY:
                # top is -inf in the first round, where total and weighted are still zero
                moved = tl.where(total > 0.0, decay * (weighted + total * (top - new_top)), 0.0)
                weighted = moved + tl.sum(tl.where(inside, e * (y - new_top), 0.0))
            if COLLISION:
                squares = squares * decay * decay + tl.sum(e * e)
            total = total * decay + tl.sum(e)
            top = new_top
        log_total = tl.log(total)
        lse = top + log_total
        y_target, _ = _scale(
            tl.load(logits + target, mask=target < vocab, other=-float("inf")).to(tl.float32),
            inv_temperature,
            softcap,
            SOFTCAP,
        )
        if SMOOTHING:
            y_target = (1.0 - smoothing) * y_target + smoothing * plain / vocab
        tl.store(log_prob_ptr + row, y_target - lse)
        tl.store(lse_ptr + row, lse)
        if ENTROPY:
            entropy = log_total - weighted / total
            tl.store(entropy_ptr + row, entropy)
        if COLLISION:
            collision = tl.log(squares) - 2.0 * log_total
            tl.store(collision_ptr + row, collision)
    else:
        lse = tl.load(lse_ptr + row)
        if G_ENTROPY:
            entropy = tl.load(entropy_ptr + row)
        if G_COLLISION:
            collision = tl.load(collision_ptr + row)
    if GRAD:
        out += row * out_stride
        g = tl.load(g_log_prob + row)
        g_p = -g
        if G_ENTROPY:
            g_h = tl.load(g_entropy + row)
        if G_COLLISION:
            g_c = tl.load(g_collision + row)
            g_p -= 2.0 * g_c
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocab
            y, slope = _scale(
                tl.load(logits + column, mask=inside, other=0.0).to(tl.float32), inv_temperature, softcap, SOFTCAP
            )
            log_p = y - lse
            p = tl.exp(log_p)
            d = p * g_p
            if G_ENTROPY:
                d -= p * (log_p + entropy) * g_h
            if G_COLLISION:
                d += 2.0 * g_c * tl.exp(2.0 * log_p - collision)
            if SMOOTHING:
                d += g * smoothing / vocab
            d += tl.where(column == target, g * (1.0 - smoothing), 0.0)
            tl.store(out + column, (d * slope).to(out.dtype.element_ty), mask=inside)


def logit_rows_triton(
    logits: Tensor,
    targets: Tensor,
    math: RowMath,
    stats: RowStats | None,
    grads: RowGrads | None,
    grad_dtype: torch.dtype,
) -> tuple[RowStats, Tensor | None]:
    """See `logit_rows`. The gradient overwrites the logits when the dtypes agree."""
    count, vocab = logits.shape
    logits = logits.contiguous()
    compute = stats is None
    if stats is None:
        numbers = [torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(4)]
        entropy, collision = (
            x if wanted else None for x, wanted in ((numbers[2], math.entropy), (numbers[3], math.collision))
        )
        stats = RowStats(numbers[0], numbers[1], entropy, collision)
    out = None
    upstream: list[Tensor | None] = [None, None, None]
    if grads is not None:
        out = logits if grad_dtype == logits.dtype else torch.empty_like(logits, dtype=grad_dtype)
        zero = torch.zeros(count, device=logits.device) if grads.log_prob is None else grads.log_prob
        upstream = [None if g is None else g.float().contiguous() for g in (zero, grads.entropy, grads.log_collision)]
    unused = stats.log_sum_exp  # a pointer for arguments that the kernel does not touch
    pointers = [
        unused if x is None else x
        for x in (stats.log_prob, stats.log_sum_exp, stats.entropy, stats.log_collision, *upstream)
    ]
    _logit_rows_kernel[(count,)](
        logits, logits.stride(0), logits if out is None else out, vocab, targets, *pointers,
        1.0 / math.temperature, math.softcap or 1.0, math.label_smoothing, vocab,
        SOFTCAP=math.softcap is not None, SMOOTHING=math.label_smoothing > 0, ENTROPY=math.entropy, COLLISION=math.collision,
        STATS=compute, GRAD=out is not None, G_ENTROPY=upstream[1] is not None, G_COLLISION=upstream[2] is not None,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return stats, out
