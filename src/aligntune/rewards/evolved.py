"""Which numbers of a reward function can evolve? Weights by a factor, parameters between bounds.

An evolution moves a vector of real numbers without limits. With one number theta for each gene:

    weight = given weight * exp(theta / UNIT)
    param  = low + (high - low) * sigmoid(logit of the given value + theta / UNIT)

so that zero is the reward as given, no vector is invalid, and weights keep their sign. UNIT is that of the mirror map's
parameters: one `sigma` fits both. A reward of weight 0 is measured and does not evolve.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aligntune.errors import ConfigError

from .combine import Entry, RewardSet
from .normalise import RunningNormaliser

UNIT = 0.01
"""The step of theta that makes a weight e times as large."""
FURTHEST = 12.0
"""Weights stay within a factor of exp(12), 160,000, of the given ones."""


@dataclass(frozen=True)
class Gene:
    """One number of the reward at `place` that evolves: its weight, or with bounds its param `param`."""

    name: str
    place: int
    start: float
    param: str | None = None
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def value(self, theta: float) -> float:
        """The weight or parameter at `theta`; a whole number where the parameter is one."""
        steps = max(-FURTHEST, min(FURTHEST, theta / UNIT))
        if self.param is None:
            return self.start * math.exp(steps)
        share = (self.start - self.low) / (self.high - self.low)
        found = self.low + (self.high - self.low) / (1 + math.exp(-(math.log(share / (1 - share)) + steps)))
        return round(found) if self.whole else found


class RewardGenes:
    """The genes of a set of rewards: its positive weights, then `params` ("REWARD.PARAM" -> [low, high]).

    `fixed`: name of a reward whose params stay as they are (the verifier). Raises `ConfigError`.
    """

    def __init__(
        self, rewards: RewardSet, params: Mapping[str, Sequence[float]] | None = None, fixed: str | None = None
    ) -> None:
        entries = list(enumerate(rewards.entries))
        self.genes = [Gene(f"{entry.name}.weight", at, entry.weight) for at, entry in entries if entry.weight > 0]
        self.genes += [_param(rewards, name, bounds, fixed) for name, bounds in (params or {}).items()]
        if len(self.genes) < 2 and not params:
            raise ConfigError(
                "rewards: one weight alone changes nothing, since advantages compare answers: give a second reward with a "
                "weight above 0, or train.evolved_params"
            )

    def __len__(self) -> int:
        return len(self.genes)

    def values(self, theta: Sequence[float]) -> dict[str, float]:
        """The numbers at `theta`, by "REWARD.weight" and "REWARD.PARAM"."""
        return {gene.name: gene.value(at) for gene, at in zip(self.genes, theta, strict=True)}

    @staticmethod
    def unchanged(rewards: RewardSet) -> RewardSet:
        """A copy of `rewards` whose running means start anew."""
        made = copy.copy(rewards)
        made.entries = [_fresh(entry) for entry in rewards.entries]
        return made

    def express(self, rewards: RewardSet, theta: Sequence[float]) -> RewardSet:
        """`rewards` with the numbers at `theta`, and running means that start anew; `rewards` itself stays as it is."""
        made = self.unchanged(rewards)
        for gene, at in zip(self.genes, theta, strict=True):
            entry = made.entries[gene.place]
            if gene.param is None:
                entry.weight = gene.value(at)
            else:
                entry.caller.params = {**entry.caller.params, gene.param: gene.value(at)}
        return made


def _fresh(entry: Entry) -> Entry:
    normaliser = None if entry.normaliser is None else RunningNormaliser(entry.normaliser.reduce)
    return replace(entry, caller=copy.copy(entry.caller), normaliser=normaliser)


def _param(rewards: RewardSet, name: str, bounds: Sequence[float], fixed: str | None) -> Gene:
    where = f"train.evolved_params.{name}"
    reward, _, param = name.rpartition(".")
    if reward not in rewards.names:
        raise ConfigError(f"{where}: say REWARD.PARAM with one of the rewards {', '.join(rewards.names)}")
    if reward == fixed:
        raise ConfigError(f"{where}: {reward} is the verifier, which does not evolve")
    place = rewards.names.index(reward)
    caller = rewards.entries[place].caller
    known = {**caller.signature.defaults, **caller.params}
    start: Any = known.get(param)
    if isinstance(start, bool) or not isinstance(start, int | float):
        numbers = [
            key for key, value in known.items() if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        raise ConfigError(f"{where}: is not a number that {reward} takes; it takes {', '.join(numbers) or 'none'}")
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{where}: evolves between {low:g} and {high:g}; both must be finite numbers")
    if not low < start < high:
        raise ConfigError(f"{where}: evolves between {low:g} and {high:g}, and starts outside at {start:g}")
    return Gene(name, place, float(start), param, float(low), float(high), isinstance(start, int))
