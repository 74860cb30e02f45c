"""Which terms do the policy-gradient losses share?

Each function returns one term of the loss as a share (see `batch`) with its metrics. Token metrics are shares of the mean
over all tokens, whatever reduction the loss uses, so that they compare between algorithms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch
from aligntune.algorithms.ops import REDUCTIONS, Reduction, clipped_surrogate, kl, masked, ratio, token_mean
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.config.rl import TrainingConfig

Clip = tuple[float, float]

REDUCTION_OF_LOSS_TYPE = {"grpo": "sequence_mean", "dapo": "token_mean", "dr_grpo": "constant"}


def clip_range(config: TrainingConfig) -> Clip:
    """(lower, upper) clip of the ratio."""
    return config.cliprange, config.cliprange if config.cliprange_high is None else config.cliprange_high


def reduction(config: TrainingConfig, default: str) -> Reduction:
    """How token losses are averaged: `config.loss_type` where given, else the algorithm's own named reduction."""
    name = default if config.loss_type is None else REDUCTION_OF_LOSS_TYPE.get(config.loss_type, config.loss_type)
    if name not in REDUCTIONS:
        raise ConfigError(f"loss_type is '{config.loss_type}'; it should be one of {', '.join(REDUCTION_OF_LOSS_TYPE)}")
    return REDUCTIONS[name]


def log_ratio(batch: RolloutBatch) -> Tensor:
    """[B, T] log w = log pi - log pi_old, zero at masked positions."""
    return masked(batch.log_probs - batch.old_log_probs, batch.completion_mask)


def surrogate_term(batch: RolloutBatch, log_w: Tensor, clip: Clip, reduce: Reduction, normalizers: Normalizers) -> Loss:
    """- reduce(min(w A, clip(w) A)), with the ratio, the clip fractions by side and the mismatch of the sampler.

    approx_kl: k3 of pi_old || pi. sampler_mismatch: mean |log pi_old - log pi_sampler|; sampler_kl: k3 of sampler || pi_old.
    A micro-batch without tokens reports a ratio of 1.
    """
    mask = batch.completion_mask
    advantages = masked(batch.token_advantages.expand_as(log_w), mask)
    objective, clipped_low, clipped_high = clipped_surrogate(log_w, advantages, *clip)
    value = -reduce(objective, mask, normalizers)
    with torch.no_grad():
        w = ratio(log_w)
        measures = {
            "ratio_mean": w,
            "clip_fraction_low": clipped_low.to(w.dtype),
            "clip_fraction_high": clipped_high.to(w.dtype),
            "approx_kl": kl("k3", -log_w),
        }
        if batch.sampler_log_probs is not None:
            mismatch = masked(batch.old_log_probs - batch.sampler_log_probs, mask)
            measures |= {"sampler_mismatch": mismatch.abs(), "sampler_kl": kl("k3", -mismatch)}
        if batch.entropy is not None:
            measures["entropy"] = batch.entropy
        metrics = {name: token_mean(measure, mask, normalizers) for name, measure in measures.items()}
        metrics["loss/policy"] = value.detach()
        metrics["ratio_min"], metrics["ratio_max"] = _extremes(w, mask)
    return Loss(value, metrics)


def kl_term(batch: RolloutBatch, config: TrainingConfig, reduce: Reduction, normalizers: Normalizers) -> Loss:
    """kl_coef * reduce(KL(pi || ref) per token) by `kl_estimator`. Nothing at kl_coef 0."""
    if config.kl_coef == 0:
        return Loss(batch.log_probs.new_zeros(()))
    divergence = kl(config.kl_estimator, reference_difference(batch))
    value = config.kl_coef * reduce(divergence, batch.completion_mask, normalizers)
    mean = token_mean(divergence.detach(), batch.completion_mask, normalizers)
    return Loss(value, {"kl": mean, "loss/kl": value.detach()})


def entropy_term(batch: RolloutBatch, config: TrainingConfig, normalizers: Normalizers) -> Loss:
    """- grpo_alpha * mean entropy over all tokens, only where `grpo_alpha` is given. (No paper defines that name.)"""
    if not entropy_bonus(config):
        return Loss(batch.log_probs.new_zeros(()))
    if batch.entropy is None:
        raise ValueError("grpo_alpha is set: the batch needs the policy's entropy")
    value = -config.grpo_alpha * token_mean(batch.entropy, batch.completion_mask, normalizers)
    return Loss(value, {"loss/entropy": value.detach()})


def entropy_bonus(config: TrainingConfig) -> bool:
    return config.is_set("grpo_alpha") and config.grpo_alpha > 0


def reference_difference(batch: RolloutBatch) -> Tensor:
    """[B, T] log pi - log ref, zero at masked positions."""
    if batch.ref_log_probs is None:
        raise ValueError("this loss compares with a reference: the batch needs ref_log_probs")
    return masked(batch.log_probs - batch.ref_log_probs, batch.completion_mask)


def total(*terms: Loss) -> Loss:
    """The sum of the terms, with all their metrics."""
    metrics: dict[str, Tensor] = {}
    for term in terms:
        metrics |= term.metrics
    value = terms[0].value
    for term in terms[1:]:
        value = value + term.value
    return Loss(value, metrics | {"loss": value.detach()})


def _extremes(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    nothing = ~mask.any()
    low = torch.where(mask, w, torch.inf).amin()
    high = torch.where(mask, w, -torch.inf).amax()
    return low.masked_fill(nothing, 1.0), high.masked_fill(nothing, 1.0)
