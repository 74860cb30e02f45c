"""How do numbers become positions? Scales, round ticks, smoothing and thinning: the arithmetic under every chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeGuard

from aligntune.reporting.text import number

MAX_POINTS = 600
LONG = 4096
"""Points; of a longer curve charts look at the extremes of `LONG / 2` stretches, and smooth the means of these."""
HUGE, TINY = 1e150, 1e-150  # what is larger has no place in a chart, what is smaller is zero
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Scale:
    """Maps data in [low, high] to user units in [start, end]; logarithmic when `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def shows(self, value: float | None) -> TypeGuard[float]:
        """Whether the value has a place: finite, and positive on a logarithmic axis."""
        return finite(value) and (value > TINY or not self.log)

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover [low, high].

    The first is at or below `low`, the last at or above `high`. A range too narrow to have ticks of its own (a billionth
    of its values) is widened by a tenth of them, or by 1 around zero.
    """
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, TINY):
        pad = 0.1 * size if size > TINY else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor for factor in (1, 2, 2.5, 5, 10) if rough <= factor * power * (1 + 1e-9)) * power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [_rounded(index * step, step) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high], both positive."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    stride = max(1, math.ceil((last - first) / 6))
    return [10.0**exponent for exponent in range(first, max(last, first + 1) + stride, stride)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Texts for evenly spaced ticks, all in one unit with the same decimals: 0, 2.5, 5 or 0, 20k, 40k or 0, 2e-05."""
    most = max(abs(tick) for tick in ticks)
    step = min(abs(b - a) for a, b in pairwise(ticks)) if len(ticks) > 1 else most or 1.0
    if most and (most < 1e-3 or most >= 1e15):
        return [number(tick, 3) for tick in ticks]
    unit, suffix = next(((u, s) for u, s in UNITS if most >= 10 * u), (1.0, ""))
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    if not math.isclose(step / unit * 10**decimals, round(step / unit * 10**decimals), rel_tol=1e-6):
        decimals += 1  # steps of 0.25
    return ["0" if tick == 0 else f"{tick / unit:,.{decimals}f}{suffix}" for tick in ticks]


def smooth(values: Numbers, weight: float) -> list[float | None]:
    """Average with weights `weight ** distance` on both sides, weight in [0, 1): it does not lag, unlike a one-sided one.

    Gaps stay gaps and do not enter the average.
    """
    there = _decayed(values, weight)
    back = _decayed(values[::-1], weight)[::-1]
    return [
        (left + right - value) / (left_mass + right_mass - 1) if finite(value) else None
        for value, (left, left_mass), (right, right_mass) in zip(values, there, back, strict=True)
    ]


def roughness(values: Numbers) -> float:
    """Von Neumann's ratio, halved: about 1 for noise, near 0 for a smooth curve; 0 for a constant or under three values."""
    solid = solids(values)
    if len(solid) < 3:
        return 0.0
    mean = sum(solid) / len(solid)
    variance = sum((value - mean) ** 2 for value in solid) / len(solid)
    steps = sum((b - a) ** 2 for a, b in pairwise(solid)) / (len(solid) - 1)
    return steps / (2 * variance) if variance else 0.0


def thin(x: Numbers, y: Numbers, limit: int = MAX_POINTS) -> list[tuple[float, float | None]]:
    """About `limit` points that keep every spike: the lowest and highest of each stretch, gaps, and both ends."""
    points = [
        (a, b if b is not None and -HUGE < b < HUGE else None)
        for a, b in zip(x, y, strict=True)
        if a is not None and -HUGE < a < HUGE
    ]
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = list(enumerate(points[start : start + size], start))
        solid = [(value, index) for index, (_, value) in stretch if value is not None]
        kept.update([index for index, (_, value) in stretch if value is None][:1])
        if solid:
            kept |= {min(solid)[1], max(solid)[1]}
    return [points[index] for index in sorted(kept)]


def means(x: Numbers, y: Numbers, count: int = LONG // 2) -> tuple[Numbers, Numbers]:
    """The curve by the means of at most `count` stretches, each at the middle of its x; a stretch without a number is a gap."""
    if len(y) <= count:
        return x, y
    size = math.ceil(len(y) / count)
    stretches = [(solids(x[at : at + size]), solids(y[at : at + size])) for at in range(0, len(y), size)]
    placed = [(places, values) for places, values in stretches if places]
    middles = [sum(places) / len(places) for places, _ in placed]
    return middles, [sum(values) / len(values) if values else None for _, values in placed]


def path(points: Sequence[tuple[float, float | None]], x: Scale, y: Scale) -> str:
    """The `d` of a polyline: `M` starts each stretch between gaps, `L` continues it; a lone point is a stroke of length 0."""
    parts, open_, alone = [], False, False
    for at, value in points:
        if not y.shows(value):
            if alone:
                parts.append("h0")
            open_ = alone = False
            continue
        parts.append(f"{'L' if open_ else 'M'}{fixed(x(at))},{fixed(y(value))}")
        open_, alone = True, not open_
    if alone:
        parts.append("h0")
    return "".join(parts)


def finite(value: float | None) -> TypeGuard[float]:
    """Neither missing, NaN nor infinite; beyond `HUGE` counts as infinite, so that differences of two numbers are not."""
    return value is not None and abs(value) < HUGE


def solids(values: Numbers) -> list[float]:
    """Those of the values that are `finite`."""
    return [value for value in values if value is not None and -HUGE < value < HUGE]


def fixed(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _rounded(value: float, step: float) -> float:
    return round(value, max(0, 2 - math.floor(math.log10(step))))


def _decayed(values: Numbers, weight: float) -> list[tuple[float, float]]:
    """For each place the sum of the finite values up to it and of their weights, older ones decayed."""
    total = mass = 0.0
    sums = []
    for value in values:
        total, mass = weight * total, weight * mass
        if finite(value):
            total, mass = total + value, mass + 1
        sums.append((total, mass))
    return sums
