"""Which backend runs which algorithm, and why not the others? Computed by asking each; no backend is imported for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aligntune.backends.base import Run
from aligntune.backends.select import backends, in_order, why_not
from aligntune.config.enums import AlgorithmType, TaskType
from aligntune.config.resolve import resolve


@dataclass(frozen=True)
class Answer:
    """What a backend says to a run: `refusal` on any machine, `absence` on this one; None: it runs it."""

    backend: str
    refusal: str | None
    absence: str | None

    @property
    def reason(self) -> str | None:
        return self.refusal or self.absence


def answers(run: Run) -> list[Answer]:
    """What each backend says to `run`, in the order in which `auto` asks them."""
    return [Answer(backend.name, backend.can_run(run), backend.available()) for backend in in_order(run)]


def matrix() -> dict[str, list[Answer]]:
    """What each backend says to the plainest run of each algorithm."""
    rows = {algorithm.value: answers(_plainest(algorithm)) for algorithm in AlgorithmType}
    classes = {"dataset": {"name": "data", "task_type": TaskType.TEXT_CLASSIFICATION.value}}
    return {"sft": rows.pop("sft"), "sft, classification": answers(_plainest(AlgorithmType.SFT, classes)), **rows}


def chosen(run: Run) -> str | None:
    """The backend that runs `run` here by `auto`, or None."""
    return next((backend.name for backend in in_order(run) if why_not(backend, run) is None), None)


def _plainest(algorithm: AlgorithmType, more: Mapping[str, Any] | None = None) -> Run:
    needs_rewards = algorithm not in (AlgorithmType.SFT, AlgorithmType.DPO)
    config = {"algorithm": algorithm.value, "model": "model", "dataset": "data"}
    rewards = {"rewards": [{"type": "length"}]} if needs_rewards else {}
    verifier = {"train": {"verifier": "exact_match"}} if algorithm is AlgorithmType.META_ES else {}
    return resolve(config | rewards | verifier | dict(more or {})).config


def backends_page() -> str:
    """`docs/backends-matrix.md`, generated; it does not depend on what this machine has."""
    names = [name.value for name in backends()]
    found = matrix()
    lines = [
        "# Which backend runs what\n",
        "Generated from the backends' own answers to the plainest run of each algorithm (defaults everywhere); do not edit. "
        "`aligntune backends FILE` asks them about your config, on your machine. `auto` takes the first that can, from left to "
        "right: native before trl, since it is measured to be faster with the same losses; for online algorithms unsloth comes last, "
        "since its rollouts are those of `generate`.\n",
        f"| algorithm | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    notes: list[str] = []
    for algorithm, row in found.items():
        cells = []
        for answer in sorted(row, key=lambda one: names.index(one.backend)):
            if answer.refusal is None:
                cells.append("yes")
                continue
            if answer.refusal not in notes:
                notes.append(answer.refusal)
            cells.append(f"no ({notes.index(answer.refusal) + 1})")
        lines.append(f"| {algorithm} | {' | '.join(cells)} |")
    lines += ["", *(f"{place}. {note}" for place, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"
