"""What will a run need, and does it fit the card? Memory and steps, as an object or a dict."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aligntune.config.load import parse_overrides
from aligntune.config.resolve import resolve
from aligntune.planning.fit import Advice, advise
from aligntune.planning.memory import GIB, moments, needed, peak
from aligntune.planning.situation import Situation, situation
from aligntune.planning.steps import Steps, count_steps


@dataclass(frozen=True)
class Plan:
    """`moments`: moment of a step -> line -> bytes. `needs`: bytes that the card must have free. `card`: bytes that it has, and
    `advice` where that is less."""

    situation: Situation
    moments: dict[str, dict[str, float]]
    steps: Steps
    card: float | None
    advice: Advice | None

    @property
    def at(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def needs(self) -> float:
        return needed(sum(self.moments[self.at].values()))

    @property
    def fits(self) -> bool | None:
        return None if self.card is None else self.needs <= self.card

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sizes in GiB."""
        run, found = self.situation.run, self.situation
        shape = found.training.shape
        return {
            "algorithm": run.algorithm.value,
            "backend": found.backend,
            "attention": found.attention,
            "processes": found.processes,
            "parameters": shape.parameters,
            "trained_parameters": found.training.trained_parameters,
            "needs_gib": gib(self.needs),
            "peak_gib": gib(peak(found.training)),
            "peak_at": self.at,
            "moments_gib": {name: {line: gib(size) for line, size in lines.items()} for name, lines in self.moments.items()},
            "card_gib": None if self.card is None else gib(self.card),
            "fits": self.fits,
            "changes": None if self.advice is None else [
                {"set": list(change.overrides), "saves_gib": gib(change.saves), "cost": change.cost} for change in self.advice.changes
            ],
            "needs_with_changes_gib": None if self.advice is None else gib(self.advice.peak),
            "fits_with_changes": None if self.advice is None else self.advice.fits,
            "steps": {name: value for name, value in asdict(self.steps).items() if name != "checkpoint_bytes"}
            | {"checkpoint_gib": gib(self.steps.checkpoint_bytes)},
            "notes": found.notes,
        }  # fmt: skip


def make_plan(
    source: str | os.PathLike[str] | Mapping[str, Any] | None, overrides: Iterable[str] = (), card: float | None = None
) -> Plan:
    """Plan the run of a config file (or dict) with overrides on a card with `card` bytes free (None: not asked).

    Raises `ConfigError`, `ModelError` or `BackendError`, as the run itself would before it loads anything.
    """
    given = list(overrides)

    def of(more: list[str]) -> Situation:
        # What was given steps back to the layer of arguments, so that a change may contradict it under another name.
        arguments = {name: value for name, value, _ in parse_overrides(given)}
        return situation(resolve(source, arguments=arguments, overrides=more).config, card)

    found = situation(resolve(source, overrides=given).config, card)
    steps = count_steps(found.run, found.training, found.processes)
    plan = Plan(found, moments(found.training), steps, card, None)
    if plan.fits is not False:
        return plan
    assert card is not None
    return Plan(found, plan.moments, steps, card, advise(of, lambda one: needed(peak(one.training)), card))


def free_memory() -> float | None:
    """Free bytes of the first visible NVIDIA GPU, by nvidia-smi; None without one. torch is not asked: it takes seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        first = visible.split(",")[0].strip()
        if first in ("", "-1"):
            return None
        query += ["-i", first]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        return float(shown[0]) * 2**20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def gib(size: float) -> float:
    return round(size / GIB, 3)
