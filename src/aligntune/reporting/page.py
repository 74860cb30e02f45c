"""What happened, on one page: `report.html`, built only from the files of the run directory.

One file without network or script, readable in light and dark and by screen readers. Everything that came from data
or config is escaped by the template engine; only drawings, which escape their own texts, are inserted as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from aligntune.reporting import palette, story
from aligntune.reporting.figures import MAIN_GROUPS, metric_groups, section_groups
from aligntune.reporting.reading import RunRecord, Setting, shown
from aligntune.reporting.run import RunDirectory
from aligntune.reporting.text import number

TEMPLATES = Path(__file__).parent / "templates"

OUTCOMES = {
    "finished": ("finished", "good"),
    "running": ("still running", "warn"),
    "failed": ("failed", "bad"),
    "interrupted": ("interrupted", "warn"),
    "killed": ("killed before it finished", "bad"),
    "unknown": ("of unknown outcome", "warn"),
}


def write_report(run_dir: str | Path | RunDirectory) -> Path:
    """Write `report.html` and return its path.

    Raises `ConfigError` when the disk refuses, `ValueError` naming the file when one of the run's files is damaged.
    """
    run = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory(run_dir)
    return run.write_text(run.report.name, render(RunRecord.load(run)))


def render(record: RunRecord) -> str:
    """The page as text."""
    comparisons = story.comparisons(record)
    changed, defaults = _by_section(record.settings)
    groups = metric_groups(record)
    said, kind = OUTCOMES.get(record.outcome, OUTCOMES["unknown"])
    return _template().render(
        record=record,
        style=Markup(palette.variables() + palette.DRAWING + (TEMPLATES / "report.css").read_text(encoding="utf-8")),
        title=story.title(record),
        subject=story.subject(record),
        outcome=said,
        outcome_kind=kind,
        error=record.status.get("error") if record.outcome == "failed" else None,
        sessions=record.status.get("sessions", []),
        cards=story.cards(record),
        facts=story.facts(record),
        warnings=[note["message"] for note in record.notes if note.get("level") == "warning"],
        notes=[note["message"] for note in record.notes if note.get("level") != "warning"],
        main_groups=[group for group in groups if group.title in MAIN_GROUPS],
        other_groups=[group for group in groups if group.title not in MAIN_GROUPS],
        comparisons=comparisons[: story.PROMPTS_SHOWN],
        more_comparisons=comparisons[story.PROMPTS_SHOWN :],
        evaluations=story.evaluations(record),
        sections=section_groups(record),
        changed=changed,
        defaults=defaults,
        defaults_count=sum(len(rows) for rows in defaults.values()),
        provenance=_provenance(record.provenance),
        commands=_commands(record),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(svg=Markup, cell=_cell, shown=shown, moment=_moment)
    return environment.get_template("report.html.j2")


def _by_section(settings: Sequence[Setting]) -> tuple[dict[str, list[Setting]], dict[str, list[Setting]]]:
    """Settings that someone or something set, and those left at their default, each by top-level section."""
    changed: dict[str, list[Setting]] = {}
    defaults: dict[str, list[Setting]] = {}
    for setting in settings:
        section = setting.path.split(".")[0] if "." in setting.path else "run"
        target = defaults if setting.origin.startswith("default") else changed
        target.setdefault(section, []).append(setting)
    return changed, defaults


def _provenance(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Heading and lines of each fact that is known."""
    rows: list[tuple[str, list[str]]] = []
    for key, value in found.items():
        if value in (None, {}, [], ""):
            continue
        if key == "packages":
            lines = [f"{name} {version}" for name, version in value.items()]
        elif key == "written":
            lines = [_moment(value)]
        elif key == "command":
            lines = [" ".join(value)]
        elif key == "git":
            lines = [
                f"{value['commit']} on {value.get('branch')}" + (", with local changes" if value.get("changed") else "")
            ]
        elif key == "backend":
            lines = [str(value["name"]), *value.get("reasons", [])]
        elif isinstance(value, Mapping):
            lines = [f"{name}: {shown(item)}" for name, item in value.items()]
        elif isinstance(value, list):
            lines = [_inline(item) for item in value]
        else:
            lines = [shown(value)]
        rows.append((key.replace("_", " "), lines))
    return rows


def _inline(item: Any) -> str:
    if isinstance(item, Mapping):
        return ", ".join(f"{key} {shown(value)}" for key, value in item.items() if value is not None)
    return shown(item)


def _commands(record: RunRecord) -> list[tuple[str, str]]:
    """What to type to repeat, continue and use this run, as far as its files allow."""
    run = record.run
    found = []
    scores = "algorithm" not in record.config and {"reward_training", "reward_pairs"} & set(record.config)
    if scores and "reward_training" in record.config:
        found.append(("Train it again, in its place", f"aligntune reward train {run.config} --overwrite"))
        if record.outcome != "finished" and run.latest_checkpoint() is not None:
            found.append(("Continue it", f"aligntune reward train {run.config} --resume"))
    elif run.config.exists() and not scores:
        found.append(("Run it again", f"aligntune train {run.config} --output-dir {run.path}-again"))
        if record.outcome != "finished" and (run.latest_checkpoint() is not None or run.evolution.exists()):
            found.append(("Continue it", f"aligntune train {run.config} --resume auto"))
    if run.model.exists() and scores:
        found.append(("Score with the model", f"aligntune reward score {run.model} DATA"))
    elif run.model.exists():
        found.append(("Talk to the model", f"aligntune chat {run.model}"))
        found.append(("Evaluate the model", f"aligntune eval {run.model} DATA"))
    return found


def _moment(timestamp: str) -> str:
    """`2026-11-24T08:20:21+00:00` as people write it."""
    return timestamp.replace("T", " ").replace("+00:00", " UTC")


def _cell(value: Any) -> dict[str, Any]:
    """A table cell: its text, and whether it is a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"text": number(value), "number": True}
    return {"text": "–" if value is None else value if isinstance(value, str) else json.dumps(value), "number": False}
