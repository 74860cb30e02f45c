"""What does an evolution's vector mean? The rewards' numbers first, then the 380 parameters of the mirror map."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aligntune.algorithms import AlgorithmSpec
from aligntune.algorithms.mirror_map import SIZE, MirrorMap
from aligntune.algorithms.neural_mirror import neural_map
from aligntune.config.algorithms import MetaESConfig
from aligntune.rewards import RewardSet
from aligntune.rewards.evolved import RewardGenes


class Genome:
    """From theta [size] (float64, unconstrained) to the rewards and the loss that a candidate trains with.

    `rewards`: as configured; `spec`: Neural Mirror GRPO; `fixed`: name of the reward whose params never evolve.
    """

    def __init__(self, config: MetaESConfig, rewards: RewardSet, spec: AlgorithmSpec, fixed: str | None) -> None:
        self.config, self._rewards, self._spec = config, rewards, spec
        self.genes = None if config.target == "mirror" else RewardGenes(rewards, config.evolved_params, fixed)
        self.cut = 0 if self.genes is None else len(self.genes)
        self.size = self.cut + (0 if config.target == "rewards" else SIZE)

    def start(self) -> Tensor:
        """The rewards as given (zeros) and the map as drawn or loaded."""
        mirror = [] if self.config.target == "rewards" else [neural_map(self.config).to_unconstrained()]
        return torch.cat([torch.zeros(self.cut, dtype=torch.float64), *mirror])

    def rewards(self, theta: Tensor) -> RewardSet:
        """A reward set of its own, with running means that start anew."""
        if self.genes is None:
            return RewardGenes.unchanged(self._rewards)
        return self.genes.express(self._rewards, theta[: self.cut].tolist())

    def mirror(self, theta: Tensor) -> MirrorMap | None:
        """The evolved map; None where it does not evolve."""
        return None if self.config.target == "rewards" else MirrorMap.from_unconstrained(theta[self.cut :])

    def spec(self, theta: Tensor) -> AlgorithmSpec:
        """Neural Mirror GRPO under the evolved map, or under the configured one."""
        mirror = self.mirror(theta)
        if mirror is None:
            return self._spec
        loss: Any = self._spec.loss
        return replace(self._spec, loss=partial(loss, distance=mirror.divergence))

    def numbers(self, theta: Tensor) -> dict[str, float]:
        """What people read of theta: "REWARD.weight", "REWARD.PARAM"; of a map its mean parameter and its a and c."""
        found = {} if self.genes is None else self.genes.values(theta[: self.cut].tolist())
        mirror = self.mirror(theta)
        if mirror is not None:
            mean, a, c = float(mirror.phi.mean()), float(mirror.phi[-2]), float(mirror.phi[-1])
            found |= {"mirror.mean": mean, "mirror.a": a, "mirror.c": c}
        return found
