"""Cross-entropy and log-probabilities straight from hidden states, without a `[tokens, vocab]` tensor.

The language-model head and the softmax run on chunks of tokens; forward and backward hold the logits of one chunk.
`linear_cross_entropy` knows the weight of every token beforehand, so it computes the gradients in its forward pass
(three matrix products instead of four); `linear_log_probs` keeps three numbers a token and recomputes the logits in
its backward pass. Both accumulate in float32 whatever the input dtype. Neither can be differentiated twice.

Shapes: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aligntune.models.kernels.logit_rows import RowGrads, RowMath, RowStats, logit_rows
from aligntune.models.precision import HALF

CHUNK_BYTES = {"cuda": 1024 * 2**20, "cpu": 4 * 2**20}
"""float32 logits held at a time, by device type."""
MIN_CHUNK_TOKENS = 128
"""Fewer rows than this make a slow matrix product."""


class LogProbs(NamedTuple):
    """Float32 `[N]` each: log-probability of the target, entropy (nats), log of the sum of squared probabilities."""

    log_probs: Tensor
    entropy: Tensor | None = None
    log_collision: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: Literal["sum", "mean", "none"] = "mean",
    chunk_tokens: int | None = None,
    float32_logits: bool = False,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, labels)` as `torch.nn.functional.cross_entropy` defines it.

    `hidden` `[N, H]`, `weight` `[V, H]`, `labels` `[N]`, `bias` `[V]`; a float32 scalar, or `[N]` for "none" (zero
    where ignored). Differs from torch in one point: the mean of no tokens is 0, not NaN. Logits of half-precision inputs
    are rounded to that precision, as a model's own are, unless `float32_logits` (CUDA).
    """
    math = RowMath(temperature=temperature, softcap=softcap, label_smoothing=label_smoothing)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    kept = labels != ignore_index
    targets = labels.masked_fill(~kept, 0)
    if reduction == "none":
        plan = _Plan.of(hidden, weight, chunk_tokens, float32_logits)
        log_probs = _LinearLogProbs.apply(hidden, weight, bias, targets, math, plan)[0]
        return torch.where(kept, -log_probs, 0.0)
    if labels.device.type == "cpu" and not bool(kept.all()):  # on CUDA counting them would wait for the device
        hidden, targets, kept = hidden[kept], targets[kept], kept[kept]
    plan = _Plan.of(hidden, weight, chunk_tokens, float32_logits)
    total = _LinearCrossEntropy.apply(hidden, weight, bias, targets, kept, math, plan)
    return total if reduction == "sum" else total / kept.sum().clamp(min=1)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    entropy_grad: bool = False,
    collision: bool = False,
    chunk_tokens: int | None = None,
    float32_logits: bool = True,
) -> LogProbs:
    """Log-probability of each target under `softmax(softcap(hidden @ weight.T + bias) / temperature)`.

    `hidden` `[N, H]`, `weight` `[V, H]`, `targets` `[N]` in `[0, V)`. `entropy` is a detached metric unless
    `entropy_grad`; `collision` (the log of `sum p^2`, which WPO and others weigh by) is differentiable. `float32_logits`
    (CUDA) keeps the rounding of half-precision logits, some hundredths of a nat, out of ratios and divergences.
    """
    math = RowMath(temperature=temperature, softcap=softcap, entropy=entropy or entropy_grad, collision=collision)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    plan = _Plan.of(hidden, weight, chunk_tokens, float32_logits)
    log_probs, entropies, log_collision = _LinearLogProbs.apply(hidden, weight, bias, targets, math, plan)
    if entropies is not None and not entropy_grad:
        entropies = entropies.detach()
    return LogProbs(log_probs, entropies, log_collision)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast the head multiplies in the autocast dtype, as `torch.nn.functional.linear` would."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden.to(weight.dtype), weight, bias


@dataclass(frozen=True)
class _Plan:
    """Tokens of a chunk, and whether half-precision operands give float32 logits."""

    tokens: int
    float32: bool

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, tokens: int | None, float32: bool) -> _Plan:
        if tokens is None:
            budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
            most = max(MIN_CHUNK_TOKENS, budget // (4 * weight.shape[0]))
            chunks = max(1, -(-hidden.shape[0] // most))
            tokens = max(1, -(-hidden.shape[0] // chunks))  # equal chunks
        return cls(tokens, float32)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, float32: bool = True) -> Tensor:
    """`[C, V]`; with `float32`, in that precision even from half-precision operands, where the device can."""
    if float32 and hidden.is_cuda and hidden.dtype in HALF:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden, weight.t())
    return logits if bias is None else logits.add_(bias)


class _HeadGrads:
    """Gradients of hidden, weight and bias, added up over chunks; None for those that need none."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.source, self.matrix = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if needed[2] and bias is not None else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(grad_logits, self.matrix, out=self.hidden[rows])
        if self.weight is not None:
            _add_product(self.weight, grad_logits.t(), self.source[rows])
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=self.bias.dtype)

    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, the sum in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right)


def _times(x: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`x * scale` in `dtype`, without a temporary in x's dtype."""
    return None if x is None else torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the kept tokens' losses; the gradients for an upstream gradient of 1 are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Tensor,
        math: RowMath,
        plan: _Plan,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3]
        head = _HeadGrads(hidden, weight, bias, needed) if any(needed) else None
        losses = []
        for rows in _chunks(hidden.shape[0], plan.tokens):
            logits = head_logits(hidden[rows], weight, bias, plan.float32)
            upstream = RowGrads(log_prob=-kept[rows].to(torch.float32)) if head else None
            stats, grad = logit_rows(logits, targets[rows], math, grads=upstream, grad_dtype=hidden.dtype)
            losses.append(torch.where(kept[rows], -stats.log_prob, 0.0).sum())
            if head and grad is not None:
                head.add(rows, grad)
            del logits, grad  # or two chunks live at a time
        ctx.dtype = weight.dtype
        ctx.save_for_backward(*(head.tensors() if head else ()))  # autograd frees them as soon as backward ran
        return torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *(_times(g, grad_output, ctx.dtype) for g in ctx.saved_tensors), None, None, None, None


class _LinearLogProbs(torch.autograd.Function):
    """(log_probs, entropy | None, log_collision | None); the backward pass recomputes the logits of each chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, math: RowMath, plan: _Plan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        parts = []
        for rows in _chunks(hidden.shape[0], plan.tokens):
            parts.append(logit_rows(head_logits(hidden[rows], weight, bias, plan.float32), targets[rows], math)[0])
        stats = _joined(parts, hidden, math)
        ctx.math, ctx.plan = math, plan
        ctx.save_for_backward(
            hidden, weight, bias, targets, stats.log_prob, stats.log_sum_exp, stats.entropy, stats.log_collision
        )
        ctx.set_materialize_grads(False)
        return stats.log_prob, stats.entropy, stats.log_collision

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *numbers = ctx.saved_tensors
        stats = RowStats(*numbers)
        if all(g is None for g in upstream):
            return (None,) * 6
        grads = RowGrads(*upstream)
        head = _HeadGrads(hidden, weight, bias, ctx.needs_input_grad[:3])
        for rows in _chunks(hidden.shape[0], ctx.plan.tokens):
            logits = head_logits(hidden[rows], weight, bias, ctx.plan.float32)
            known, wanted = stats.rows(rows), grads.rows(rows)
            _, grad = logit_rows(logits, targets[rows], ctx.math, stats=known, grads=wanted, grad_dtype=hidden.dtype)
            if grad is not None:
                head.add(rows, grad)
            del logits, grad  # or two chunks live at a time
        return *(None if g is None else g.to(weight.dtype) for g in head.tensors()), None, None, None


def _joined(parts: list[RowStats], hidden: Tensor, math: RowMath) -> RowStats:
    if not parts:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return RowStats(empty, empty, empty if math.entropy else None, empty.clone() if math.collision else None)
    if len(parts) == 1:
        return parts[0]
    entropy = torch.cat([s.entropy for s in parts if s.entropy is not None]) if math.entropy else None
    collision = torch.cat([s.log_collision for s in parts if s.log_collision is not None]) if math.collision else None
    return RowStats(
        torch.cat([s.log_prob for s in parts]), torch.cat([s.log_sum_exp for s in parts]), entropy, collision
    )
