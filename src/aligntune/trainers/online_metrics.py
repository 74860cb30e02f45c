"""Numbers between two log lines: collected per optimiser step and per rollout phase, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from aligntune.rewards.normalise import Moments


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
    if name.endswith(("_min", "min_length")):
        return min(values)
    if name.endswith(("_max", "max_length")):
        return max(values)
    return sum(values) if name.endswith("_seconds") else sum(values) / len(values)


def of_all_shares(shares: Mapping[str, Tensor], accelerator: Any) -> dict[str, float]:
    """Loss metrics of this process (shares: see `algorithms.batch`) as those of the whole optimiser batch."""
    names = sorted(shares)
    values = torch.stack([shares[name].detach().double() for name in names])
    if accelerator.num_processes > 1:
        gathered = accelerator.gather(values.to(accelerator.device)[None])
        ends = [("_min" if name.endswith("_min") else "_max" if name.endswith("_max") else "") for name in names]
        reduce = {
            "_min": lambda column: column.min(),
            "_max": lambda column: column.max(),
            "": lambda column: column.sum(),
        }
        values = torch.stack([reduce[end](gathered[:, at]) for at, end in enumerate(ends)])
    return dict(zip(names, values.tolist(), strict=True))


def of_all_processes(metrics: Mapping[str, float], accelerator: Any) -> dict[str, float]:
    """Metrics of a phase, averaged over the processes that measured them."""
    if accelerator.num_processes == 1:
        return dict(metrics)
    parts = gathered([dict(metrics)])
    names = sorted({name for part in parts for name in part})
    # Processes work at the same time, so that seconds are averaged like everything else.
    means = {name: [part[name] for part in parts if name in part] for name in names}
    return {
        name: sum(values) / len(values) if name.endswith("_seconds") else summary(name, values)
        for name, values in means.items()
    }


def gathered(records: Sequence[Any]) -> list[Any]:
    """The records of all processes, by rank."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(records)
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, list(records))
    return [record for part in parts for record in part]


def gathered_moments(moments: Moments) -> list[Moments]:
    """A reward's moments of every process, so that all normalise alike."""
    return gathered([moments])
