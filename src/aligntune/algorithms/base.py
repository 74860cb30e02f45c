"""What is an algorithm to a trainer?

An `AlgorithmSpec`: what data it eats, what it needs computed, how rewards become advantages, and its loss. A trainer asks
the spec and never the name, so the arithmetic of a new algorithm is one file in this folder (and its name and settings, see
docs/architecture.md, are in `config`):

    @algorithm("mine", inputs="rollouts", needs=..., advantages=...)
    def loss(batch: RolloutBatch, config: TrainingConfig, normalizers: Normalizers) -> Loss: ...

An online trainer's step: sample completions and score them; keep the groups that `keep_groups` says; make advantages
(once per rollout); then for `num_ppo_epochs` passes call `loss` on micro-batches. A pair trainer only calls `loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from aligntune.algorithms.batch import Loss, Normalizers
from aligntune.algorithms.ops import AllSum, one_process
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.config.rl import TrainingConfig

LossFunction = Callable[[Any, Any, Normalizers], Loss]


@dataclass(frozen=True)
class Needs:
    """What the trainer has to compute besides the policy's log-probabilities, under a given config."""

    reference: bool = False
    """Log-probabilities of a frozen reference."""
    values: bool = False
    """A value model's predictions, at rollout time and in the update."""
    rewards: bool = False
    """Scores of the completions."""
    entropy: bool = False
    """Entropy of the next-token distribution, with gradient."""
    collision: bool = False
    """log sum_v pi(v)^2 at every completion token of a pair."""
    whole_batch: bool = False
    """Pairs: `PairBatch.whole`, the sequence log-probabilities of the optimiser batch, before its first micro-batch."""


@dataclass
class ScoredRollouts:
    """Completions of a rollout phase on this rank, with everything that makes advantages. B = P * G rows, row p * G + g.

    rewards: [P, G] weighted sum of all rewards; NaN where none applied, and there the mask is empty.
    completion_mask: [B, T], true at every token of the completion, truncated or not.
    ended: [B], true where the completion produced its stop token.
    old_log_probs, ref_log_probs, values: [B, T] at rollout time; the last two where the algorithm needs them.
    """

    rewards: Tensor
    completion_mask: Tensor
    ended: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor | None = None
    values: Tensor | None = None

    def __post_init__(self) -> None:
        self.completion_mask, self.ended = self.completion_mask.bool(), self.ended.bool()
        if self.rewards.dim() != 2 or self.rewards.numel() != len(self.completion_mask):
            raise ValueError(f"{tuple(self.rewards.shape)} rewards for {len(self.completion_mask)} completions")

    @property
    def lengths(self) -> Tensor:
        """[P, G] completion tokens."""
        return self.completion_mask.sum(1).view_as(self.rewards)


@dataclass
class Advantages:
    """advantages: [B] or [B, T]. returns: [B, T], the value model's targets. metrics: means over this rank's rollouts
    (average them over ranks)."""

    advantages: Tensor
    returns: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


AdvantageFunction = Callable[[ScoredRollouts, Any, AllSum], Advantages]


def keep_all(rewards: Tensor, config: TrainingConfig) -> Tensor:
    """[P, G] -> [P], all true."""
    return torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)


def no_advice(config: TrainingConfig) -> list[str]:
    return []


def no_sections(config: TrainingConfig) -> list[dict[str, Any]]:
    return []


@dataclass(frozen=True)
class AlgorithmSpec:
    """Everything a trainer may know about an algorithm."""

    name: str
    inputs: Literal["pairs", "rollouts"]
    """The batch type of the loss: `PairBatch` or `RolloutBatch`."""
    loss: LossFunction
    """(batch, config, normalizers) -> the micro-batch's share of the loss."""
    needs: Callable[[Any], Needs]
    advantages: AdvantageFunction | None = None
    """(rollouts, config, all_sum) -> advantages; None for pairs."""
    group_relative: bool = False
    """Compares completions of one prompt, so it needs at least two."""
    keep_groups: Callable[[Tensor, Any], Tensor] = keep_all
    """(rewards [P, G], NaN where missing; config) -> [P]: which prompts to train on; the trainer draws others for those dropped (dynamic
    sampling), at most `max_resample_batches` times."""
    check: Callable[[Any], object] = no_advice
    """Raises ConfigError where something that the settings name cannot be used; called once, before training. (What settings
    alone decide is refused in `config`.)"""
    advice: Callable[[Any], list[str]] = no_advice
    """Sentences to log once, before training: settings that defeat the algorithm, with the paper's values."""
    sections: Callable[[Any], list[dict[str, Any]]] = no_sections
    """What the report shows of the algorithm itself: `kind`, `title`, `group` and `payload` of each section."""

    def compute_advantages(
        self, rollouts: ScoredRollouts, config: TrainingConfig, all_sum: AllSum = one_process
    ) -> Advantages:
        if self.advantages is None:
            raise TypeError(f"{self.name} learns from pairs: it has no advantages")
        return self.advantages(rollouts, config, all_sum)


_REGISTRY: dict[str, AlgorithmSpec] = {}


def register(spec: AlgorithmSpec) -> AlgorithmSpec:
    """Make `spec` known under its name; a name may be taken once."""
    if spec.name in _REGISTRY:
        raise ConfigError(f"an algorithm named '{spec.name}' is registered already")
    _REGISTRY[spec.name] = spec
    return spec


def algorithm(name: str, **fields: Any) -> Callable[[LossFunction], LossFunction]:
    """Decorator of a loss function: registers `AlgorithmSpec(name, loss=function, **fields)`."""

    def decorate(loss: LossFunction) -> LossFunction:
        register(AlgorithmSpec(name=name, loss=loss, **fields))
        return loss

    return decorate


def get(name: str) -> AlgorithmSpec:
    """The spec called `name`; case, '-' and '_' do not matter. ConfigError lists the names there are."""
    wanted = _plain(name)
    for known, spec in _REGISTRY.items():
        if _plain(known) == wanted:
            return spec
    raise ConfigError(f"there is no algorithm '{name}'; there are {', '.join(names())}")


def names() -> list[str]:
    return sorted(_REGISTRY)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")
