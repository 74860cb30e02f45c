"""What do some rows of logits say, and what is the gradient with respect to them?

One function, `logit_rows`, on a chunk of logits `[C, V]`. On CUDA it is one Triton kernel that reads each row once
(twice with the gradient, the second time mostly from L2); elsewhere it is plain torch. All sums are float32
(float64 for float64 input).

With `y = softcap * tanh(logits / softcap) / temperature`, `p = softmax(y)`, target `t` and label smoothing `e`:

    log_prob      = (1 - e) * y_t + e * mean(y) - logsumexp(y)
    entropy       = -sum p log p          d/dy = -p (log p + entropy)
    log_collision = log sum p^2           d/dy = 2 p^2 / sum p^2 - 2 p
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowMath:
    """The function from logits to distribution, and which statistics of it are wanted."""

    temperature: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    entropy: bool = False
    collision: bool = False


@dataclass(frozen=True)
class RowStats:
    """Per row, float32 `[C]`; `entropy` and `log_collision` are None unless asked for."""

    log_prob: Tensor
    log_sum_exp: Tensor
    entropy: Tensor | None = None
    log_collision: Tensor | None = None

    def rows(self, part: slice) -> RowStats:
        """The same statistics of some rows."""
        entropy, collision = _part(self.entropy, part), _part(self.log_collision, part)
        return RowStats(self.log_prob[part], self.log_sum_exp[part], entropy, collision)


@dataclass(frozen=True)
class RowGrads:
    """Upstream gradients of the statistics, `[C]` each; None means zero."""

    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    log_collision: Tensor | None = None

    def rows(self, part: slice) -> RowGrads:
        """The same gradients of some rows."""
        return RowGrads(_part(self.log_prob, part), _part(self.entropy, part), _part(self.log_collision, part))


def _part(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


def logit_rows(
    logits: Tensor,
    targets: Tensor,
    math: RowMath,
    *,
    stats: RowStats | None = None,
    grads: RowGrads | None = None,
    grad_dtype: torch.dtype | None = None,
) -> tuple[RowStats, Tensor | None]:
    """Statistics of each row, and the gradient with respect to `logits` when `grads` is given.

    `logits` `[C, V]` may be overwritten by the gradient (same dtype, contiguous). `targets` `[C]` are in `[0, V)`.
    Known `stats` are not computed again; a gradient of the entropy or collision needs that statistic.
    """
    if grads is not None:
        math = replace(
            math,
            entropy=math.entropy or grads.entropy is not None,
            collision=math.collision or grads.log_collision is not None,
        )
    if logits.is_cuda and logits.dtype != torch.float64 and _triton_works():
        from aligntune.models.kernels.logit_rows_triton import logit_rows_triton

        return logit_rows_triton(logits, targets, math, stats, grads, grad_dtype or logits.dtype)
    scaled = _scaled(logits, math)
    stats = _stats(scaled, targets, math) if stats is None else stats
    if grads is None:
        return stats, None
    return stats, _gradient(logits, scaled, targets, math, stats, grads).to(grad_dtype or logits.dtype)


def _triton_works() -> bool:
    from torch.utils._triton import has_triton  # the test torch.compile itself uses

    return has_triton()


def _scaled(logits: Tensor, math: RowMath) -> Tensor:
    y = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if math.softcap is not None:
        y = torch.tanh(y / math.softcap) * math.softcap
    return y if math.temperature == 1.0 else y / math.temperature


def _stats(y: Tensor, targets: Tensor, math: RowMath) -> RowStats:
    log_sum_exp = torch.logsumexp(y, dim=-1)
    score = y.gather(-1, targets[:, None]).squeeze(-1)
    if math.label_smoothing:
        score = torch.lerp(score, y.mean(-1), math.label_smoothing)
    entropy = log_collision = None
    if math.entropy or math.collision:
        log_p = y - log_sum_exp[:, None]
        entropy = -(log_p.exp() * log_p).sum(-1) if math.entropy else None
        log_collision = torch.logsumexp(2 * log_p, dim=-1) if math.collision else None
    return RowStats(score - log_sum_exp, log_sum_exp, entropy, log_collision)


def _gradient(logits: Tensor, y: Tensor, targets: Tensor, math: RowMath, stats: RowStats, grads: RowGrads) -> Tensor:
    log_p = y - stats.log_sum_exp[:, None]
    out = torch.exp(log_p)
    extra = None
    if grads.entropy is not None and stats.entropy is not None:
        extra = out * (log_p + stats.entropy[:, None]) * grads.entropy[:, None]
    out *= _coefficient_of_p(grads)
    if extra is not None:
        out -= extra
    if grads.log_collision is not None and stats.log_collision is not None:
        out += 2 * torch.exp(2 * log_p - stats.log_collision[:, None]) * grads.log_collision[:, None]
    if grads.log_prob is not None:
        g, smoothing = grads.log_prob.to(out.dtype)[:, None], math.label_smoothing
        if smoothing:
            out += g * (smoothing / y.shape[-1])
        out.scatter_add_(-1, targets[:, None], g * (1 - smoothing))
    if math.softcap is not None:
        out *= 1 - torch.tanh(logits.to(out.dtype) / math.softcap).square()
    return out if math.temperature == 1.0 else out.div_(math.temperature)


def _coefficient_of_p(grads: RowGrads) -> Tensor | float:
    """What multiplies p in the gradient, `[C, 1]`: `-g` of the log-probability and `-2 g` of the collision."""
    parts = [-factor * g[:, None] for factor, g in ((1, grads.log_prob), (2, grads.log_collision)) if g is not None]
    return sum(parts) if parts else 0.0
