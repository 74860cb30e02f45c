"""What does a rollout phase leave for the updates? Completions with everything that their loss needs.

A `Rollout` lives on the CPU as plain lists and tensors, so that a checkpoint can hold it. Shapes: P prompts, G completions
of each, B = P * G rows (the completions of a prompt are neighbours), T tokens of the longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aligntune.algorithms.batch import Normalizers, RolloutBatch
from aligntune.models.packed import PackedRows
from aligntune.trainers.online_forward import Predictions


@dataclass
class Rollout:
    """One phase of this process. Log-probabilities are those of the tempered distribution; padding is 0."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    loss_mask: Tensor
    """[B, T] tokens that carry loss."""
    counted: Tensor
    """[B] rows of the optimiser batch; the others only fill it up (no reward, or dropped by dynamic sampling)."""
    advantages: Tensor
    """[B] or [B, T]"""
    sampler_log_probs: Tensor
    """[B, T]"""
    old_log_probs: Tensor | None = None
    """[B, T], None where each phase serves one update and the old policy is the new one."""
    ref_log_probs: Tensor | None = None
    """[B, T]"""
    values: Tensor | None = None
    """[B, T]"""
    returns: Tensor | None = None
    """[B, T]"""
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completion_ids)

    def lengths(self, rows: Tensor) -> list[int]:
        """Tokens of prompt and completion of each of these rows."""
        return [len(self.prompt_ids[at]) + len(self.completion_ids[at]) for at in rows.tolist()]

    def counts(self, rows: Tensor, max_completion_length: int) -> Normalizers:
        """What the losses of an optimiser batch of these rows divide by."""
        sequences, tokens = self.counted[rows].sum(), self.loss_mask[rows].sum()
        return Normalizers(sequences.double(), tokens.double(), max_completion_length)

    def with_loss(self, rows: Tensor) -> Tensor:
        """The rows that carry loss: the others reach no value and no gradient, so their forward pass is saved. At least one row
        stays, since every process has to run the model."""
        kept = rows[self.loss_mask[rows].any(1)]
        if len(kept):
            return kept
        return rows[torch.tensor(self.lengths(rows)).argmin()][None]

    def packed(self, rows: Tensor, device: torch.device) -> PackedRows:
        """Prompts and completions of these rows, the completions trained."""
        at = rows.tolist()
        return PackedRows.from_completions(
            [self.prompt_ids[i] for i in at], [self.completion_ids[i] for i in at], device
        )

    def batch(self, rows: Tensor, packed: PackedRows, new: Predictions) -> RolloutBatch:
        """What a loss sees of these rows; `new` are the policy's predictions of `packed`."""
        log_probs = packed.padded(new.log_probs)
        width, device = log_probs.shape[1], log_probs.device

        def part(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return (values[rows, :width] if values.dim() == 2 else values[rows]).to(device)

        old, mask, advantages = part(self.old_log_probs), part(self.loss_mask), part(self.advantages)
        assert mask is not None
        assert advantages is not None
        return RolloutBatch(
            log_probs=log_probs,
            old_log_probs=log_probs.detach() if old is None else old,
            completion_mask=mask,
            advantages=advantages,
            ref_log_probs=part(self.ref_log_probs),
            sampler_log_probs=part(self.sampler_log_probs),
            values=None if new.values is None else packed.padded(new.values),
            old_values=part(self.values),
            returns=part(self.returns),
            entropy=None if new.entropy is None else packed.padded(new.entropy),
        )


def padded(values: Sequence[Sequence[float]]) -> Tensor:
    """Lists of different length as [B, T] float32, zero on the right."""
    width = max(map(len, values))
    return torch.tensor([[*row, *([0.0] * (width - len(row)))] for row in values])


def length_mask(completion_ids: Sequence[Sequence[int]]) -> Tensor:
    """[B, T], true where there is a token."""
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    return torch.arange(int(lengths.max()))[None] < lengths[:, None]
