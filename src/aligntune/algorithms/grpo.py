"""Group relative policy optimisation (arXiv 2402.03300): advantages from the completions of one prompt, no value model.

    A_i = (R_i - mean_G R) / (std_G R + 1e-4)
    L = 1/B sum_i 1/n_i sum_t [ -min(w A, clip(w, 1 - low, 1 + high) A) + kl_coef * kl_t ]

DAPO, Dr. GRPO, GSPO and Neural Mirror GRPO are this file with one part exchanged each. Deviation from the paper: an entropy
bonus when `grpo_alpha` is given. The paper's k3, used as a loss, pulls towards the minimum of KL(ref || pi), not of
KL(pi || ref); `kl_estimator: k2` gives the gradient of the latter (see `ops.kl`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aligntune.algorithms.base import Advantages, Needs, ScoredRollouts, algorithm
from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch
from aligntune.algorithms.ops import AllSum, group_advantages, group_spread, one_process
from aligntune.algorithms.policy import (
    Clip,
    clip_range,
    entropy_bonus,
    entropy_term,
    kl_term,
    log_ratio,
    reduction,
    surrogate_term,
    total,
)

if TYPE_CHECKING:
    from aligntune.config.algorithms import GRPOConfig


def needs(config: GRPOConfig) -> Needs:
    return Needs(reference=config.kl_coef > 0, rewards=True, entropy=entropy_bonus(config))


def group_relative(rewards: Tensor, scale: str, all_sum: AllSum = one_process) -> Advantages:
    """[P, G] rewards -> [B] advantages; zero_variance_groups is the share of prompts whose completions all score the same."""
    advantages = group_advantages(rewards, scale, all_sum=all_sum)
    _, deviation = group_spread(rewards)
    metrics = {
        "group_reward_std": deviation.mean(),
        "zero_variance_groups": same_rewards(rewards).to(rewards.dtype).mean(),
    }
    return Advantages(advantages.flatten(), metrics=metrics)


def same_rewards(rewards: Tensor) -> Tensor:
    """[P, G] -> [P]: groups without a learning signal, those with fewer than two rewards (NaN: missing) among them."""
    missing = rewards.isnan()
    most, least = rewards.masked_fill(missing, -torch.inf), rewards.masked_fill(missing, torch.inf)
    return most.amax(dim=1) <= least.amin(dim=1)


def advantages(rollouts: ScoredRollouts, config: GRPOConfig, all_sum: AllSum = one_process) -> Advantages:
    return group_relative(rollouts.rewards, config.scale_rewards, all_sum)


def policy_loss(
    batch: RolloutBatch,
    config: GRPOConfig,
    normalizers: Normalizers,
    *,
    average: str,
    clip: Clip,
    log_w: Tensor | None = None,
) -> Loss:
    """The loss of the family: surrogate, KL and entropy bonus.

    average: the algorithm's own reduction, which `loss_type` overrides. log_w: [B, T] log-ratio, unless it is the token's.
    """
    reduce = reduction(config, average)
    log_w = log_ratio(batch) if log_w is None else log_w
    return total(
        surrogate_term(batch, log_w, clip, reduce, normalizers),
        kl_term(batch, config, reduce, normalizers),
        entropy_term(batch, config, normalizers),
    )


def advice(config: GRPOConfig) -> list[str]:
    if config.kl_coef > 0 and config.kl_estimator == "k1":
        return ["kl_estimator k1 has zero expected gradient in the loss: the KL term only adds noise; use k2 or k3"]
    return []


@algorithm("grpo", inputs="rollouts", needs=needs, advantages=advantages, group_relative=True, advice=advice)
def loss(batch: RolloutBatch, config: GRPOConfig, normalizers: Normalizers) -> Loss:
    return policy_loss(batch, config, normalizers, average="sequence_mean", clip=clip_range(config))
