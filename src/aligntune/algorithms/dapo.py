"""Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476). GRPO with four changes:

1. Clip-higher: the upper clip is 0.28 (`cliprange_high`), so that unlikely tokens can grow.
2. Dynamic sampling: prompts whose completions all score the same are replaced (`keep_groups`).
3. Token-level loss: the mean over all tokens of the optimiser batch.
4. Overlong shaping: truncated completions carry no loss (`mask_truncated_completions`), and `overlong_buffer` tokens before
   the limit a soft punishment begins (Eq. 13).

The paper also drops KL; here `kl_coef` keeps the reference's default (the recipe sets 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from aligntune.algorithms import grpo
from aligntune.algorithms.base import Advantages, ScoredRollouts, algorithm, keep_all
from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch
from aligntune.algorithms.ops import AllSum, divide, masked, one_process
from aligntune.algorithms.policy import clip_range

if TYPE_CHECKING:
    from aligntune.config.algorithms import DAPOConfig


def overlong_punishment(lengths: Tensor, limit: int, buffer: int, most: float) -> Tensor:
    """Eq. 13, any shape: 0 up to `limit - buffer` tokens, then linear down to `-most` at `limit`, and `-most` beyond."""
    return most * ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def keep_groups(rewards: Tensor, config: DAPOConfig) -> Tensor:
    """[P, G] -> [P]: prompts with a learning signal. Judged on the rewards before the soft punishment, as in verl, whose
    spread would otherwise pass for one."""
    return ~grpo.same_rewards(rewards) if config.dynamic_sampling else keep_all(rewards, config)


def advantages(rollouts: ScoredRollouts, config: DAPOConfig, all_sum: AllSum = one_process) -> Advantages:
    """The soft punishment is added to the rewards before they are compared within the group."""
    rewards, metrics = rollouts.rewards, {}
    if config.overlong_buffer:
        punishment = overlong_punishment(
            rollouts.lengths, config.max_completion_length, config.overlong_buffer, config.overlong_penalty
        )
        scored = ~rewards.isnan()
        mean = divide(masked(punishment, scored).sum(), scored.sum())
        rewards, metrics = rewards + punishment, {"overlong_punishment": mean}
    result = grpo.group_relative(rewards, config.scale_rewards, all_sum)
    result.metrics |= metrics
    return result


@algorithm(
    "dapo",
    inputs="rollouts",
    needs=grpo.needs,
    advantages=advantages,
    group_relative=True,
    keep_groups=keep_groups,
    advice=grpo.advice,
)
def loss(batch: RolloutBatch, config: DAPOConfig, normalizers: Normalizers) -> Loss:
    return grpo.policy_loss(batch, config, normalizers, average="token_mean", clip=clip_range(config))
