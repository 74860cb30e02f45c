"""Which prompts come next? An endless order, as a function of the seed and the position alone, so that a run can continue."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

STRETCH = 16
"""Phases' worth of prompts that are sorted by length among themselves."""


class PromptStream:
    """Prompts without end, in a new order each pass.

    `rank` of `world` takes every `world`-th prompt. With `by_length`, a phase (`phase` prompts, of all processes) holds
    prompts of like length, and the phases come in random order.
    """

    def __init__(
        self, rows: Any, *, seed: int, phase: int = 1, by_length: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.rows, self.seed, self.phase, self.rank, self.world = rows, seed, phase, rank, world
        self.lengths = np.asarray(rows.with_format("numpy")["length"][:]) if by_length else None
        self.position = 0
        """Prompts drawn so far, over all processes."""
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Prompts of a pass."""
        return len(self.rows)

    def draw(self, count: int) -> list[dict[str, Any]]:
        """This process's share of the next `count` prompts; every process must draw as many."""
        found = [self.rows[at] for at in self.places(self.position, count)]
        self.position += count
        return found

    def places(self, position: int, count: int) -> list[int]:
        """Which rows this process takes when `count` prompts are drawn from `position` on by all processes."""
        own = range(position + self.rank, position + count, self.world)
        return [int(self.order(place // len(self))[place % len(self)]) for place in own]

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The rows in the order of this pass."""
        if epoch not in self._orders:
            self._orders = {at: order for at, order in self._orders.items() if at == epoch - 1}
            self._orders[epoch] = self._ordered(epoch)
        return self._orders[epoch]

    def _ordered(self, epoch: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self))
        if self.lengths is None:
            return order
        size = STRETCH * self.phase
        stretches = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in stretches])
        phases = [order[start : start + self.phase] for start in range(0, len(order), self.phase)]
        last = phases.pop() if len(phases[-1]) < self.phase else order[:0]  # a part of a phase stays at the end
        return np.concatenate([*(phases[at] for at in generator.permutation(len(phases))), last])
