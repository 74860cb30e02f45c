"""What did a run leave behind? The files of a run directory, read into one record for the report page.

Missing files are empty parts: a run that failed early still has a page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import yaml

from aligntune.reporting.provenance import is_secret
from aligntune.reporting.run import RunDirectory

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of libyaml: the texts of a reward model's training are many

LONG_LIST = 64
"""Entries; a longer list is cut on the page."""


@dataclass(frozen=True)
class Setting:
    """One resolved setting: dotted path, value, and where the value came from (`default`, `run.yaml:12`, ...)."""

    path: str
    value: Any
    origin: str


@dataclass(frozen=True)
class RunRecord:
    """Everything the page shows. `sections` holds the newest of each group and title, in order of first appearance."""

    run: RunDirectory
    outcome: str
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    settings: list[Setting]
    provenance: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    sections: list[dict[str, Any]]
    notes: list[dict[str, Any]]

    @classmethod
    def load(cls, run: RunDirectory) -> RunRecord:
        """Read the files. Raises `ValueError` naming the file when one is damaged."""
        config = _yaml(run)
        events = run.sections.rows()
        newest = {(row.get("group"), row.get("title")): row for row in events if row.get("kind") != "note"}
        return cls(
            run=run,
            outcome=run.outcome(),
            status=run.read_status(),
            config=config,
            settings=_settings(run, config),
            provenance=_json(run.provenance) or {},
            metrics=run.metrics.rows(),
            samples=run.samples.rows(),
            sections=list(newest.values()),
            notes=[row for row in events if row.get("kind") == "note"],
        )

    @cached_property
    def _series(self) -> dict[str, dict[str, dict[float, float | None]]]:
        """Split -> metric -> step -> value. A step that was logged twice counts once, with its later value."""
        found: dict[str, dict[str, dict[float, float | None]]] = {}
        for row in self.metrics:
            step, metrics = row.get("step", 0), found.setdefault(str(row.get("split", "train")), {})
            for name, value in row.items():
                if name not in ("step", "split") and (value is None or isinstance(value, (int, float))):
                    metrics.setdefault(name, {})[step] = value
        return found

    def splits(self) -> list[str]:
        """The splits that have metrics, training first."""
        return sorted(self._series, key=lambda split: split != "train")

    def names(self, split: str) -> list[str]:
        """Names of the numeric metrics of a split, in order of first appearance."""
        return list(self._series.get(split, {}))

    def series(self, split: str, name: str) -> tuple[list[float], list[float | None]]:
        """Steps and values of a metric; None is a gap."""
        values = self._series.get(split, {}).get(name, {})
        return list(values), list(values.values())

    def last_step(self) -> int:
        """The highest step of the trail."""
        return max((row.get("step", 0) for row in self.metrics), default=0)

    def seconds(self) -> float | None:
        """Time spent in sessions that ended; of one that was killed, what its last metrics line says."""
        total, known = 0.0, False
        for session in self.status.get("sessions", []):
            if session.get("started") and session.get("ended"):
                span = datetime.fromisoformat(session["ended"]) - datetime.fromisoformat(session["started"])
                total, known = total + span.total_seconds(), True
        logged = [row["elapsed_s"] for row in self.metrics if isinstance(row.get("elapsed_s"), (int, float))]
        return max([total] * known + logged[-1:], default=None)


def shown(value: Any) -> str:
    """A setting's value in one line, as YAML would read it; of a long list of texts the first, and how many there are."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and len(value) > LONG_LIST:
        return f"{json.dumps(value[:2], ensure_ascii=False)[:-1]}, ...] ({len(value)} entries)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted paths and values of nested mappings; empty ones and lists are values."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def _settings(run: RunDirectory, config: Mapping[str, Any]) -> list[Setting]:
    rows = _json(run.origins)
    if rows is None:
        found = [(path, value, "") for path, value in flatten(config)]
    else:
        found = [(r["path"], r["value"], r["origin"]) if isinstance(r, dict) else tuple(r[:3]) for r in rows]
    return [
        Setting(str(path), "***" if value is not None and is_secret(str(path)) else value, str(origin))
        for path, value, origin in found
    ]


def _yaml(run: RunDirectory) -> dict[str, Any]:
    if not run.config.exists():
        return {}
    try:
        content = yaml.load(run.config.read_text(encoding="utf-8"), LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{run.config} is not YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def _json(path: Any) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
