"""What does a loss see, and what does it give back?

Shapes, here and in the whole package: B sequences or pairs, T padded completion length, P prompts, G completions per
prompt (B = P * G, the completions of a prompt are neighbours). Position t holds the log-probability of completion token t;
prompts are never part of these tensors. Masked positions may hold anything, NaN included: they reach no value and no
gradient. Log-probabilities are float32 or float64: in bfloat16 they have three digits, and a ratio of two is noise.

Every loss is a *share*. It divides by the counts of the whole optimiser batch (`Normalizers`), so the shares of the
micro-batches and of the ranks add up to the loss of the batch, however it was cut. Under DDP or FSDP, which average
gradients over ranks, multiply the value by the number of ranks before `backward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass
class Loss:
    """A scalar to call `backward` on, and detached scalars to log.

    Metrics are shares too: sum them over micro-batches and ranks to get the value of the optimiser batch. Names that end
    in `_min` or `_max` are extremes: reduce them by minimum or maximum. `combine_metrics` does both.
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def combine_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of the whole from the metrics of its micro-batches (or ranks): sums, minima and maxima by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value
            elif name.endswith("_min"):
                total[name] = torch.minimum(total[name], value)
            elif name.endswith("_max"):
                total[name] = torch.maximum(total[name], value)
            else:
                total[name] = total[name] + value
    return total


@dataclass(frozen=True)
class Normalizers:
    """Counts over the whole optimiser batch: all micro-batches of all ranks.

    num_sequences: completions, or pairs for preference losses. A row whose mask is empty (a truncated completion that
        carries no loss) still counts, as in TRL: dropping one leaves the others' weights alone.
    num_tokens: completion tokens that carry loss; for pairs, those of the chosen answers.
    max_completion_length: the configured limit, the denominator of the `constant` reduction.
    """

    num_sequences: Tensor | float
    num_tokens: Tensor | float
    max_completion_length: int = 0

    def __add__(self, other: Normalizers) -> Normalizers:
        return Normalizers(
            self.num_sequences + other.num_sequences,
            self.num_tokens + other.num_tokens,
            max(self.max_completion_length, other.max_completion_length),
        )


@dataclass
class RolloutBatch:
    """A micro-batch of completions for the policy-gradient losses.

    log_probs: [B, T] of the policy being trained, with gradient.
    old_log_probs: [B, T] of the policy at rollout time, recomputed by the trainer.
    completion_mask: [B, T], true where a token carries loss (end of sequence included).
    advantages: [B] or [B, T], from the algorithm's `advantages`.
    ref_log_probs: [B, T] of the reference, where the algorithm needs it.
    sampler_log_probs: [B, T] as the rollout engine reported them, only to measure its mismatch.
    values, old_values, returns: [B, T] for PPO: `values` with gradient, the others from rollout time.
    entropy: [B, T] of the policy's next-token distribution, with gradient when an entropy bonus is on.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    completion_mask: Tensor
    advantages: Tensor
    ref_log_probs: Tensor | None = None
    sampler_log_probs: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        self.completion_mask = self.completion_mask.bool()
        shape = self.log_probs.shape
        for name in ("old_log_probs", "completion_mask", "ref_log_probs", "sampler_log_probs", "values", "old_values",
                     "returns", "entropy"):  # fmt: skip
            _check_shape(name, getattr(self, name), shape)
        _check_precision("log_probs", self.log_probs)
        if self.advantages.shape not in (shape, shape[:1]):
            raise ValueError(
                f"advantages are {tuple(self.advantages.shape)}, expected {tuple(shape[:1])} or {tuple(shape)}"
            )

    @property
    def token_advantages(self) -> Tensor:
        """[B, T] or broadcastable to it."""
        return self.advantages if self.advantages.dim() == 2 else self.advantages.unsqueeze(1)

    def normalizers(self, max_completion_length: int = 0) -> Normalizers:
        """This micro-batch's own counts; add those of the others to get the optimiser batch's."""
        return Normalizers(len(self.log_probs), self.completion_mask.sum(), max_completion_length)


@dataclass(frozen=True)
class PairLogProbs:
    """Sequence log-probabilities of M pairs, [M] each; the reference's are 0 without a reference."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor

    def detach(self) -> PairLogProbs:
        return PairLogProbs(*(getattr(self, f.name).detach() for f in fields(self)))

    @classmethod
    def cat(cls, parts: Sequence[PairLogProbs]) -> PairLogProbs:
        """The pairs of several micro-batches (or ranks), in that order."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass
class PairBatch:
    """A micro-batch of preference pairs.

    chosen_log_probs, rejected_log_probs: [B, T] of the policy, with gradient; the two T may differ.
    chosen_mask, rejected_mask: [B, T], true at the completion's tokens.
    ref_chosen_log_probs, ref_rejected_log_probs: the reference's, [B, T], or [B] if summed before (`dpo.sequence_log_probs`).
        None without a reference.
    chosen_log_collision, rejected_log_collision: [B, T] log sum_v pi(v)^2 of the policy at each token, for `use_weighting`.
    whole: detached `PairLogProbs` of the whole optimiser batch, for the losses that compare pairs with each other (kto, aot,
        aot_unpaired); this micro-batch is its rows `first`, `first + 1`, ... None: this micro-batch is the whole.
    """

    chosen_log_probs: Tensor
    rejected_log_probs: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    ref_chosen_log_probs: Tensor | None = None
    ref_rejected_log_probs: Tensor | None = None
    chosen_log_collision: Tensor | None = None
    rejected_log_collision: Tensor | None = None
    whole: PairLogProbs | None = None
    first: int = 0

    def __post_init__(self) -> None:
        self.chosen_mask, self.rejected_mask = self.chosen_mask.bool(), self.rejected_mask.bool()
        for side in ("chosen", "rejected"):
            log_probs = getattr(self, f"{side}_log_probs")
            _check_precision(f"{side}_log_probs", log_probs)
            for name in (f"{side}_mask", f"{side}_log_collision"):
                _check_shape(name, getattr(self, name), log_probs.shape)
            reference = getattr(self, f"ref_{side}_log_probs")
            summed = reference is not None and reference.dim() == 1
            _check_shape(f"ref_{side}_log_probs", reference, log_probs.shape[:1] if summed else log_probs.shape)
        if len(self.chosen_log_probs) != len(self.rejected_log_probs):
            raise ValueError(
                f"{len(self.chosen_log_probs)} chosen answers for {len(self.rejected_log_probs)} rejected ones"
            )

    def normalizers(self) -> Normalizers:
        """This micro-batch's own counts; add those of the others to get the optimiser batch's."""
        return Normalizers(len(self.chosen_log_probs), self.chosen_mask.sum())


def _check_shape(name: str, tensor: Tensor | None, shape: torch.Size) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)}")


def _check_precision(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {tensor.dtype}; compute log-probabilities in float32")
