"""What happens in a run that someone may want to see? One `Recorder`, told by trainers, fans out to every sink.

    recorder.metrics(10, {"loss": 1.2, "learning_rate": 2e-5})
    recorder.metrics(10, {"accuracy": 0.4}, split="eval")
    recorder.sample(10, {"prompt": "2 + 2 =", "completion": " 4", "rewards": {"exact": 1.0}})
    recorder.section("matrix", "Confusion matrix", sections.matrix(...))
    recorder.note("evaluation is off: no eval split", level="warning")

A recorder without sinks records nothing: ranks other than 0 get one, so that trainers need not ask who they are.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.reporting.run import RunDirectory
from aligntune.reporting.sections import checked


class Sink:
    """Where events go. Every method does nothing here; a sink overrides those it can show.

    `required` sinks stop the run when they fail (the trail on the disk); any other is switched off with one warning.
    """

    name = "sink"
    required = False

    def metrics(self, step: int, values: Mapping[str, Any], split: str) -> None:
        """Values of one step of one split (`train`, `eval`, ...)."""

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """One text that the model wrote at `step`, with its prompt."""

    def section(self, section: Mapping[str, Any]) -> None:
        """A report section: `step`, `kind`, `title`, `group`, `payload`."""

    def note(self, step: int, message: str, level: str) -> None:
        """A sentence for people; `level` is `info` or `warning`."""

    def progress(self, step: int, total: int | None, phase: str) -> None:
        """`step` of `total` is done; `phase` is `train`, `eval`, `rollout`, ... Called often, must be cheap."""

    def close(self, failed: bool = False) -> None:
        """Flush and release; `failed` when the run did not finish."""


class TrailSink(Sink):
    """The JSON lines in the run directory: always there, and the only source of the report page."""

    name = "trail"
    required = True

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._notes = {row.get("message") for row in run.sections.rows() if row.get("kind") == "note"}

    def metrics(self, step: int, values: Mapping[str, Any], split: str) -> None:
        self.run.metrics.append({"step": step, "split": split, **values})

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        self.run.samples.append({"step": step, **sample})

    def section(self, section: Mapping[str, Any]) -> None:
        self.run.sections.append(section)

    def note(self, step: int, message: str, level: str) -> None:
        if message not in self._notes:  # a resumed run says again what it said at its first start
            self.run.sections.append({"step": step, "kind": "note", "level": level, "message": message})

    def close(self, failed: bool = False) -> None:
        for lines in (self.run.metrics, self.run.samples, self.run.sections):
            lines.close()


class Recorder:
    """Tells every sink what happens. Steps are optimiser steps (or generations) from 1; 0 is before training."""

    def __init__(self, sinks: Sequence[Sink] = (), *, step: int = 0) -> None:
        """`step`: where a resumed run continues."""
        self._sinks = list(sinks)
        self.step = step
        self._notes: set[str] = set()
        self._not_finite: set[str] = set()

    def metrics(self, step: int, values: Mapping[str, Any], split: str = "train") -> None:
        """Record numbers (Python, numpy or torch scalars; None is "not measured") of one step.

        The first time a metric is NaN or infinite, a warning names it. Raises `ValueError` on the names step and split.
        """
        for reserved in ("step", "split"):
            if reserved in values:
                raise ValueError(f"'{reserved}' is a column of its own and cannot be a metric name")
        self.step = step
        plain = {name: _scalar(value) for name, value in values.items()}
        self._tell("metrics", step, plain, split)
        for name, value in plain.items():
            if isinstance(value, float) and not math.isfinite(value) and f"{split}/{name}" not in self._not_finite:
                self._not_finite.add(f"{split}/{name}")
                self.note(f"{split} {name} is {value} at step {step}", level="warning")

    def sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Record one completion: `prompt` (text or messages) and `completion`, and what else is known of it.

        The page knows `reference`, `reward` and `rewards` (by name), and shows other fields as they are. Samples of one
        prompt at different steps are set side by side; `id` tells prompts apart when their texts are equal.
        """
        self._tell("sample", step, dict(sample))

    def section(
        self, kind: str, title: str, payload: Mapping[str, Any], *, group: str = "Results", step: int | None = None
    ) -> None:
        """Add a report section (kinds and payloads: `aligntune.reporting.sections`).

        A later section of the same group and title takes the earlier one's place on the page.
        """
        where = self.step if step is None else step
        content = checked(kind, payload)
        self._tell("section", {"step": where, "kind": kind, "title": title, "group": group, "payload": content})

    def note(self, message: str, level: str = "info") -> None:
        """Say something once: the same message again is not repeated."""
        if level not in ("info", "warning"):
            raise ValueError(f"the level of a note is info or warning, not '{level}'")
        if message not in self._notes:
            self._notes.add(message)
            self._tell("note", self.step, message, level)

    def progress(self, step: int, total: int | None, phase: str = "train") -> None:
        """Move the progress display."""
        self._tell("progress", step, total, phase)

    def close(self, failed: bool | None = None) -> None:
        """Close every sink; more events are then lost. Trackers are told if the run `failed`.

        By default it did if an exception is on its way, as in `finally: recorder.close()`.
        """
        self._tell("close", sys.exc_info()[0] is not None if failed is None else failed)
        self._sinks = []

    def _tell(self, event: str, *arguments: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, event)(*arguments)
            except Exception as error:  # boundary: a tracker whose server is away must not end a training run
                if sink.required:
                    raise
                self._sinks.remove(sink)
                self.note(f"the logger '{sink.name}' failed and is switched off: {error}", level="warning")


def _scalar(value: Any) -> Any:
    """A Python number for anything that holds one; other values unchanged."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    if hasattr(value, "item"):  # numpy and torch scalars, without importing either
        return value.item()
    return value
