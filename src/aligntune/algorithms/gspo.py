"""Group sequence policy optimisation (arXiv 2507.18071): ratio and clip act on whole sequences.

    s_i = (pi(y_i) / pi_old(y_i))^(1 / n_i),   L = 1/B sum_i -min(s_i A_i, clip(s_i, 1 - left, 1 + right) A_i)

Written as GSPO-token (Eq. 13 and 14), s_it = sg[s_i] * pi_t / sg[pi_t], which has the same value and gradient when all tokens
of a sequence share one advantage, and also takes advantages per token. With one update per rollout it equals GRPO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from aligntune.algorithms import grpo
from aligntune.algorithms.base import algorithm
from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch
from aligntune.algorithms.ops import masked, sequence_means
from aligntune.algorithms.policy import Clip, clip_range, log_ratio

if TYPE_CHECKING:
    from aligntune.config.algorithms import GSPOConfig

NEVER_BINDS = 0.05
"""A geometric mean of token ratios hardly ever moves this far."""


def sequence_clip(config: GSPOConfig) -> Clip:
    """(left, right): `gspo_gamma` and `gspo_delta` where given, else the common clip range. Paper: 3e-4 and 4e-4."""
    low, high = clip_range(config)
    low = config.gspo_gamma if config.is_set("gspo_gamma") else low
    high = config.gspo_delta if config.is_set("gspo_delta") else high
    return low, high


def sequence_log_ratio(batch: RolloutBatch) -> Tensor:
    """[B, T] log s_it: every token has its sequence's mean log-ratio as value, and its own log-probability's gradient."""
    mask = batch.completion_mask
    mean = sequence_means(log_ratio(batch).detach(), mask).unsqueeze(1)
    return masked(mean + batch.log_probs - batch.log_probs.detach(), mask)


def advice(config: GSPOConfig) -> list[str]:
    messages = grpo.advice(config)
    low, high = sequence_clip(config)
    if min(low, high) >= NEVER_BINDS:
        messages.append(
            f"GSPO's clip range ({low:g} left, {high:g} right) never binds, because its ratio is averaged over the sequence;"
            " the paper uses gspo_gamma 3e-4 and gspo_delta 4e-4"
        )
    return messages


@algorithm("gspo", inputs="rollouts", needs=grpo.needs, advantages=grpo.advantages, group_relative=True, advice=advice)
def loss(batch: RolloutBatch, config: GSPOConfig, normalizers: Normalizers) -> Loss:
    return grpo.policy_loss(
        batch,
        config,
        normalizers,
        average="sequence_mean",
        clip=sequence_clip(config),
        log_w=sequence_log_ratio(batch),
    )
