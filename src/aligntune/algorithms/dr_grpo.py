"""GRPO done right (arXiv 2503.20783): GRPO without its two biases.

No division by the group's standard deviation (it overweights prompts that are nearly always solved or failed), and a
constant normaliser in place of the sequence's length (which makes long wrong answers cheap):

    A_i = R_i - mean_G R,   L = 1 / (B * max_completion_length) sum_i sum_t ...

The authors' code divides by the generation limit, TRL's by B times it, as here; the constant only scales the learning rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligntune.algorithms import grpo
from aligntune.algorithms.base import algorithm
from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch
from aligntune.algorithms.policy import clip_range

if TYPE_CHECKING:
    from aligntune.config.algorithms import DrGRPOConfig


def advice(config: DrGRPOConfig) -> list[str]:
    messages = grpo.advice(config)
    if config.scale_rewards != "none":
        messages.append(
            f"scale_rewards is {config.scale_rewards}: Dr. GRPO is defined by not dividing the advantages; leave it unset"
        )
    return messages


@algorithm(
    "dr_grpo", inputs="rollouts", needs=grpo.needs, advantages=grpo.advantages, group_relative=True, advice=advice
)
def loss(batch: RolloutBatch, config: DrGRPOConfig, normalizers: Normalizers) -> Loss:
    return grpo.policy_loss(batch, config, normalizers, average="constant", clip=clip_range(config))
