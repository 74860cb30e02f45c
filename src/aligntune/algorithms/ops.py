"""Which small operations are the losses made of?

Masked sums, whitening, KL estimators, the three ways to average token losses, the clipped surrogate, group advantages and
generalised advantage estimation. Shapes as in `batch`: B sequences, T tokens, P prompts, G completions per prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aligntune.algorithms.batch import Normalizers
from aligntune.algorithms.special import exp_remainder
from aligntune.errors import ConfigError

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before `exp` (as in verl): beyond, the ratio is 1 to 5e8 and one token would be the whole
gradient. A token past the limit has no gradient."""

STD_EPSILON = 1e-4
"""Added to the standard deviation of a group of rewards (as in TRL)."""

AllSum = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks; given by the trainer where a statistic is of the whole batch."""


def one_process(tensor: Tensor) -> Tensor:
    """The `AllSum` of a run with one process."""
    return tensor


# ---- masks ----------------------------------------------------------------------------------------------------------


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with zeros where `mask` is false: padding may hold NaN, and neither value nor gradient sees it."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """`total / count`, and 0 for an empty count (its total is 0)."""
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def sequence_means(values: Tensor, mask: Tensor) -> Tensor:
    """[B]: each row's mean over its tokens, 0 for an empty row."""
    return divide(masked(values, mask).sum(1), mask.sum(1))


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False, all_sum: AllSum = one_process) -> Tensor:
    """Masked values of [B, T] scaled to unit (unbiased) variance and, unless `keep_mean`, shifted to mean 0.

    In float64, as in `group_advantages`."""
    count, wide = all_sum(mask.sum()), values.double()
    mean = divide(all_sum(masked(wide, mask).sum()), count)
    variance = divide(all_sum(masked(wide - mean, mask).square().sum()), count - 1)
    whitened = (wide - mean) * torch.rsqrt(variance + 1e-8)
    return masked(whitened + mean if keep_mean else whitened, mask).to(values.dtype)


# ---- averages of token losses ---------------------------------------------------------------------------------------


def sequence_mean(values: Tensor, mask: Tensor, normalizers: Normalizers) -> Tensor:
    """Mean over sequences of token means (GRPO): 1/B sum_i 1/n_i sum_t."""
    return divide(sequence_means(values, mask).sum(), normalizers.num_sequences)


def token_mean(values: Tensor, mask: Tensor, normalizers: Normalizers) -> Tensor:
    """Mean over all tokens of the optimiser batch (DAPO, PPO): 1/N sum_i sum_t."""
    return divide(masked(values, mask).sum(), normalizers.num_tokens)


def constant(values: Tensor, mask: Tensor, normalizers: Normalizers) -> Tensor:
    """Sum over tokens, divided by a constant (Dr. GRPO): 1/(B * max_completion_length) sum_i sum_t."""
    if normalizers.max_completion_length < 1:
        raise ValueError("the constant reduction divides by max_completion_length: give it to the Normalizers")
    return divide(masked(values, mask).sum(), normalizers.num_sequences * normalizers.max_completion_length)


Reduction = Callable[[Tensor, Tensor, Normalizers], Tensor]

REDUCTIONS: dict[str, Reduction] = {"sequence_mean": sequence_mean, "token_mean": token_mean, "constant": constant}


# ---- divergence and surrogate ---------------------------------------------------------------------------------------


def kl(estimator: str, difference: Tensor) -> Tensor:
    """KL(pi || ref) per token from tokens of pi, with `difference = log pi - log ref` (Schulman's k1, k2, k3).

    k1 = d: unbiased, can be negative. k2 = d^2/2: biased. k3 = exp(-d) - 1 + d: unbiased and never negative.
    As a *loss* under on-policy sampling, k1 has zero expected gradient, k2 that of KL(pi || ref), and k3, the choice of
    the GRPO paper, that of KL(ref || pi).
    """
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return exp_remainder((-difference).clamp(max=LOG_RATIO_LIMIT))
    raise ConfigError(f"kl_estimator is '{estimator}'; it should be k1, k2 or k3")


def ratio(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio, within `LOG_RATIO_LIMIT`."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """min(w A, clip(w, 1 - low, 1 + high) A) per token, and where the lower and the upper clip took the gradient.

    log_ratio: [B, T] log w, zero at masked positions. advantages: broadcastable to it.
    """
    w = ratio(log_ratio)
    objective = torch.minimum(w * advantages, w.clamp(1 - low, 1 + high) * advantages)
    return objective, (w < 1 - low) & (advantages < 0), (w > 1 + high) & (advantages > 0)


# ---- advantages -----------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, scale: str, *, all_sum: AllSum = one_process) -> Tensor:
    """[P, G] -> [P, G]: rewards minus the mean of their group, divided by a standard deviation.

    scale: `group` divides by the group's, `batch` by that of all rewards of all ranks (2508.08221), `none` not at all.
    The deviation is the unbiased one plus 1e-4 (as in TRL and verl; the GRPO paper says nothing). Equal rewards give 0: in
    float32 their mean would be off by a rounding, which the small deviation makes an advantage of up to 1. A missing reward
    (NaN) is no part of any mean or deviation, and its advantage is 0.
    """
    if rewards.shape[1] < 2:
        raise ConfigError(
            "a group needs at least 2 completions per prompt to compare: set num_generations to 2 or more"
        )
    centered, deviation = group_spread(rewards)
    match scale:
        case "none":
            return centered.to(rewards.dtype)
        case "group":
            pass
        case "batch":
            wide, scored = rewards.double(), ~rewards.isnan()
            count = all_sum(scored.sum())
            mean = divide(all_sum(masked(wide, scored).sum()), count)
            deviation = divide(all_sum(masked(wide - mean, scored).square().sum()), count - 1).sqrt()
        case _:
            raise ConfigError(f"scale_rewards is '{scale}'; it should be group, batch or none")
    return (centered / (deviation + STD_EPSILON)).to(rewards.dtype)


def group_spread(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """[P, G] rewards, NaN where one is missing -> ([P, G] distances from the group's mean, 0 where missing; [P, 1] the group's
    unbiased deviation, 0 of fewer than two), in float64."""
    scored = ~rewards.isnan()
    wide, count = masked(rewards.double(), scored), scored.sum(1, keepdim=True)
    centered = masked(wide - divide(wide.sum(1, keepdim=True), count), scored)
    return centered, divide(centered.square().sum(1, keepdim=True), count - 1).sqrt()


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438): ([B, T] advantages, [B, T] returns = advantages + values).

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, nothing after the last token. Masked positions
    (padding, or tokens that a tool wrote) are stepped over, as if they were not there.
    """
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        columns.append(advantage)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    advantages = masked(torch.stack(columns[::-1], dim=1), mask)
    return advantages, masked(advantages + values, mask)
