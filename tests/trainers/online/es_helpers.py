"""What the tests of Meta-ES share: rewards, and the files of two runs compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from es_rewards import digits, longer
from safetensors.torch import load_file

from aligntune.trainers.evolving import Evolution
from comparing import without_timing

Evolve = Callable[..., Any]
TWO = [{"type": digits, "weight": 0.5}, {"type": longer, "weight": 2.0}]


def state(folder: Path) -> dict[str, Any]:
    """evolution.json without what measures the machine."""
    saved = json.loads((folder / "evolution.json").read_text())
    return {"state": saved["state"], "history": [without_timing(record) for record in saved["history"]]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "model").glob("*.safetensors")))


def trail(folder: Path) -> list[dict[str, Any]]:
    return [without_timing(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_runs(one: Path, other: Path) -> None:
    assert state(one) == state(other)
    assert trail(one) == trail(other)
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


class Killed(Exception):
    """In place of kill -9: nothing of ours catches it."""


def killed_after(session: Any, generations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the state of `generations` generations is saved."""
    save, count = Evolution._save, 0

    def saving(self: Evolution) -> None:
        nonlocal count
        save(self)
        count += 1
        if count == generations:
            raise Killed

    monkeypatch.setattr(Evolution, "_save", saving)
    with pytest.raises(Killed):
        session.train()
    monkeypatch.undo()
