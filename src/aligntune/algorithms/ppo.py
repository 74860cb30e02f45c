"""Proximal policy optimisation (arXiv 1707.06347) for language models, with a value head (details: arXiv 2403.17031).

    r_t = -kl_coef * kl_t, plus at the last token: score - missing_eos_penalty * [no stop token]
    A = whiten(GAE(r, V)),  returns = GAE(r, V) + V
    L = mean_t max(-w A, -clip(w, 1 - e, 1 + e) A) + vf_coef / 2 * mean_t max((V - R)^2, (clip(V, V_old +- e_v) - R)^2)

Both means are over all tokens of the optimiser batch. Deviation from TRL's former PPOTrainer: the score sits on the last
completion token (the stop token), not on the position after it; k2 is allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aligntune.algorithms.base import Advantages, Needs, ScoredRollouts, algorithm
from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch
from aligntune.algorithms.ops import AllSum, divide, gae, kl, masked, one_process, token_mean, whiten
from aligntune.algorithms.policy import clip_range, log_ratio, surrogate_term, total

if TYPE_CHECKING:
    from aligntune.config.algorithms import PPOConfig


def needs(config: PPOConfig) -> Needs:
    return Needs(reference=config.kl_coef > 0, values=True, rewards=True)


def token_kl(rollouts: ScoredRollouts, config: PPOConfig) -> Tensor:
    """[B, T] by `kl_estimator`, zero without a reference."""
    if rollouts.ref_log_probs is None:
        if config.kl_coef > 0:
            raise ValueError("kl_coef is above 0: the rollouts need ref_log_probs")
        return torch.zeros_like(rollouts.old_log_probs)
    difference = masked(rollouts.old_log_probs - rollouts.ref_log_probs, rollouts.completion_mask)
    return kl(config.kl_estimator, difference)


def token_rewards(rollouts: ScoredRollouts, config: PPOConfig, divergence: Tensor) -> Tensor:
    """[B, T]: the KL penalty everywhere, the score at each completion's last token."""
    mask = rollouts.completion_mask
    scores = rollouts.rewards.flatten() - config.missing_eos_penalty * (~rollouts.ended)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return torch.where(positions == last, scores.unsqueeze(1), 0.0) - config.kl_coef * divergence


def advantages(rollouts: ScoredRollouts, config: PPOConfig, all_sum: AllSum = one_process) -> Advantages:
    """[B, T] whitened advantages and the value model's targets. `whiten_rewards` divides the token rewards by their standard
    deviation over the batch; their mean stays."""
    if rollouts.values is None:
        raise ValueError("PPO needs the value model's predictions")
    mask = rollouts.completion_mask
    divergence = token_kl(rollouts, config)
    rewards = token_rewards(rollouts, config, divergence)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True, all_sum=all_sum)
    raw, returns = gae(rewards, rollouts.values, mask, config.gamma, config.lam)
    tokens = all_sum(mask.sum())
    metrics = {
        "kl": divide(all_sum(divergence.sum()), tokens),
        "missing_eos": (~rollouts.ended).to(rewards.dtype).mean(),
        "return_mean": divide(all_sum(returns.sum()), tokens),
    }
    return Advantages(whiten(raw, mask, all_sum=all_sum), returns, metrics)


def value_term(batch: RolloutBatch, config: PPOConfig, normalizers: Normalizers) -> Loss:
    """vf_coef / 2 * token mean of max((V - R)^2, (V clipped to +-cliprange_value around V_old - R)^2)."""
    if batch.values is None or batch.old_values is None or batch.returns is None:
        raise ValueError("PPO's loss needs values, old_values and returns")
    values, old_values, returns = (
        masked(x, batch.completion_mask) for x in (batch.values, batch.old_values, batch.returns)
    )
    clipped = old_values + (values - old_values).clamp(-config.cliprange_value, config.cliprange_value)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    mean = token_mean(torch.maximum(error, clipped_error), batch.completion_mask, normalizers)
    bound = token_mean((clipped_error > error).to(error.dtype), batch.completion_mask, normalizers)
    value = config.vf_coef * 0.5 * mean
    return Loss(value, {"loss/value": value.detach(), "value_error": mean.detach(), "clip_fraction_value": bound})


@algorithm("ppo", inputs="rollouts", needs=needs, advantages=advantages)
def loss(batch: RolloutBatch, config: PPOConfig, normalizers: Normalizers) -> Loss:
    policy = surrogate_term(batch, log_ratio(batch), clip_range(config), token_mean, normalizers)
    return total(policy, value_term(batch, config, normalizers))
