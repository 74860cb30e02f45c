"""Numbers between two log lines: collected per optimiser step and per rollout phase, over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aligntune.algorithms.batch import combine_metrics
from aligntune.rewards.normalise import Moments, merge
from aligntune.trainers.parallel import gathered

LEAST, MOST = ("_min", "min_length"), ("_max", "max_length")
EXTREMES = LEAST + MOST
"""How names of extremes end."""


class Meter:
    """Means of what was added since the last `pop`; extremes for names in `_min` and `_max`, sums for `_seconds`."""

    def __init__(self) -> None:
        self.entries: list[Mapping[str, float]] = []

    def add(self, entry: Mapping[str, float]) -> None:
        self.entries.append(entry)

    def pop(self) -> dict[str, float]:
        """The summary, and a fresh start."""
        found: dict[str, float] = {}
        for name in dict.fromkeys(name for entry in self.entries for name in entry):
            values = [entry[name] for entry in self.entries if name in entry]
            found[name] = summary(name, values)
        self.entries = []
        return found


def summary(name: str, values: Sequence[float]) -> float:
    """One number for several measurements of `name`."""
    if name.endswith(LEAST):
        return min(values)
    if name.endswith(MOST):
        return max(values)
    return sum(values) if name.endswith("_seconds") else sum(values) / len(values)


def of_all_shares(shares: Mapping[str, Tensor], accelerator: Any) -> dict[str, float]:
    """Loss metrics of this process (shares: see `algorithms.batch`) as those of the whole optimiser batch."""
    names = sorted(shares)
    values = torch.stack([shares[name].detach().double() for name in names])
    if accelerator.num_processes > 1:
        ranks = accelerator.gather(values.to(accelerator.device)[None])
        whole = combine_metrics(dict(zip(names, rank, strict=True)) for rank in ranks)
        values = torch.stack([whole[name] for name in names])
    return dict(zip(names, values.tolist(), strict=True))


def of_all_processes(metrics: Mapping[str, float], accelerator: Any) -> dict[str, float]:
    """Metrics of the processes that measured them, as those of one; each process has measured as much as the others."""
    if accelerator.num_processes == 1:
        return dict(metrics)
    parts = gathered([dict(metrics)])
    return pooled(parts, [1.0] * len(parts), at_once=True)


def pooled(parts: Sequence[Mapping[str, float]], counts: Sequence[float], *, at_once: bool = False) -> dict[str, float]:
    """Metrics of several parts, with `counts` samples each, as those of all samples: extremes, means, and spreads about the mean
    of all. Seconds are summed, or averaged for parts that were measured `at_once`, by several processes.

    A part in which a name is missing measured nothing for it. Scores that are null count neither for mean nor for spread.
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [(part, count) for part, count in zip(parts, counts, strict=True) if name in part]
        values, mean = [part[name] for part, _ in having], _mean_of(name)
        weights = [count * _share_scored(part, mean or name) for part, count in having]
        seconds = name.endswith("_seconds")
        if name.endswith(EXTREMES) or (seconds and not at_once):
            found[name] = summary(name, values)
        elif mean is None:
            found[name] = _average(values, weights)
        else:
            whole: Moments = (0.0, 0.0, 0.0)
            for (part, _), weight, spread in zip(having, weights, values, strict=True):
                whole = merge(whole, (weight, part[mean], weight * spread**2))
            found[name] = math.sqrt(whole[2] / whole[0]) if whole[0] else 0.0
    return found


def _average(values: Sequence[float], weights: Sequence[float]) -> float:
    total = math.fsum(weights)
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else 0.0


def _mean_of(name: str) -> str | None:
    """The name of the mean to which the population spread `name` belongs; None for what is no spread."""
    if name == "reward_std":
        return "reward"
    prefix, _, last = name.rpartition("/")
    return f"{prefix}/mean" if last == "std" else None


def _share_scored(part: Mapping[str, float], mean: str) -> float:
    """The share of samples that the mean `mean` is of: for rewards, those whose score is not null."""
    if mean == "reward":
        return 1 - part.get("reward_null", 0.0)
    prefix, _, last = mean.rpartition("/")
    if last != "mean":
        return 1.0
    above = prefix.rpartition("/")[0]  # rewards/NAME/weighted has the nulls of rewards/NAME
    return 1 - part.get(f"{prefix}/null", part.get(f"{above}/null", 0.0))


def gathered_moments(moments: Moments) -> list[Moments]:
    """A reward's moments of every process, so that all normalise alike."""
    return gathered([moments])
