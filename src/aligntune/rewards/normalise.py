"""What is usual for this reward? A running mean and standard deviation that survive a restart exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Moments = tuple[float, float, float]  # count, mean, sum of squared deviations
Reduce = Callable[[Moments], Sequence[Moments]]


def moments(values: Sequence[float]) -> Moments:
    """Count, mean and sum of squared deviations of a batch."""
    if not values:
        return (0.0, 0.0, 0.0)
    mean = math.fsum(values) / len(values)
    return (float(len(values)), mean, math.fsum((value - mean) ** 2 for value in values))


def merge(left: Moments, right: Moments) -> Moments:
    """The moments of two batches together (Chan, Golub, LeVeque 1979, eq. 1.5)."""
    count = left[0] + right[0]
    if not count:
        return left
    delta = right[1] - left[1]
    mean = left[1] + delta * right[0] / count
    return (count, mean, left[2] + right[2] + delta * delta * left[0] * right[0] / count)


class RunningNormaliser:
    """(x - mean) / std over all scores seen so far, those of the present batch included; population std.

    While every score was the same, the result is 0. `reduce` gathers the batch's moments from all processes, so that
    every rank normalises alike; unset, each process has its own.
    """

    def __init__(self, reduce: Reduce | None = None) -> None:
        self.state: Moments = (0.0, 0.0, 0.0)
        self.reduce = reduce

    def update(self, values: Sequence[float]) -> None:
        """Take a batch of scores into account."""
        batch = moments(values)
        for part in self.reduce(batch) if self.reduce else [batch]:
            self.state = merge(self.state, part)

    def __call__(self, value: float) -> float:
        count, mean, squares = self.state
        std = math.sqrt(squares / count) if count else 0.0
        # Rounding leaves a constant reward with a deviation near, not at, zero.
        return (value - mean) / std if std > 1e-9 * max(1.0, abs(mean)) else 0.0
