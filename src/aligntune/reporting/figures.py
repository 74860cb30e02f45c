"""Which charts does a run deserve? Metrics grouped by name, and report sections drawn by kind.

A metric `loss` logged for two splits is one chart with two curves. `rewards/NAME/mean` of several rewards is one chart
with a curve per reward. Other `prefix/name` metrics are small charts under the heading of their prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligntune.reporting.reading import RunRecord
from aligntune.reporting.scales import solids
from aligntune.reporting.svg import COLOURS, Line, line_chart
from aligntune.reporting.svg_blocks import bar_chart, matrix_chart
from aligntune.reporting.text import is_timing, label, value_text

FIRST = (
    *("reward", "loss", "accuracy", "mean_token_accuracy", "perplexity", "learning_rate", "grad_norm"),
    *("entropy", "kl"),
)
MAIN_GROUPS = ("Learning", "Rewards")
"""What stands before the evaluations and samples; the other groups of metrics follow them, smaller."""
HIDDEN = ("epoch", "num_tokens", "elapsed_s")
LOGARITHMIC = ("loss", "perplexity", "grad_norm")
ONE_CHART = ("rewards",)
"""Prefixes whose `prefix/NAME` metrics share a scale, so that the names are curves of one chart."""


@dataclass
class Figure:
    """A drawing with its heading; `wide` ones take the whole row."""

    title: str
    svg: str
    wide: bool = False


@dataclass
class Group:
    """Figures under one heading, and the metrics that never changed, which need no chart."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    constants: list[tuple[str, str]] = field(default_factory=list)


def metric_groups(record: RunRecord) -> list[Group]:
    """Every metric with at least two points, in groups: learning, rewards, one for each other prefix, then speed."""
    charts: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for split in record.splits():
        for name in record.names(split):
            if name not in HIDDEN and len(solids(record.series(split, name)[1])) > 1:
                heading, chart, curve = _place(name)
                charts.setdefault((heading, chart), []).append((split, name, curve))
    groups: dict[str, Group] = {}
    for (heading, chart), curves in sorted(charts.items(), key=lambda item: _order(*item[0])):
        group = groups.setdefault(heading, Group(heading))
        constant = _constant(record, curves)
        if constant is not None:
            group.constants.append((label(chart), value_text(curves[0][1], constant)))
        else:
            group.figures += _charts(record, chart, curves, heading, first=not group.figures)
    return list(groups.values())


def section_groups(record: RunRecord) -> dict[str, list[dict[str, Any]]]:
    """Sections by group, each with `svg` added when its kind is a drawing."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for section in record.sections:
        drawn = draw_section(section["kind"], section["title"], section["payload"])
        groups.setdefault(section.get("group") or "Results", []).append({**section, "svg": drawn})
    return groups


def draw_section(kind: str, title: str, payload: Mapping[str, Any]) -> str:
    """The SVG of a series, bars or matrix section; nothing for the kinds that are text."""
    if kind == "series":
        lines = [Line(c["name"], c["x"], c["y"], c.get("low"), c.get("high")) for c in payload["curves"]]
        return line_chart(lines, title=title, x_label=payload["x_label"], log_y=payload["log_y"])
    if kind == "bars":
        return bar_chart(payload["labels"], payload["values"], title=title)
    if kind == "matrix":
        labels = {"row_label": payload["row_label"], "column_label": payload["column_label"]}
        return matrix_chart(payload["values"], payload["rows"], payload["columns"], title=title, **labels)
    return ""


def _place(name: str) -> tuple[str, str, str]:
    """Group, chart and curve of a metric; the curve is empty where the chart holds this metric alone."""
    prefix, _, rest = name.partition("/")
    if is_timing(name):
        return "Speed and memory", label(rest if prefix in ("perf", "timing") else name), ""
    if not rest:
        return "Learning", name, ""
    first, _, last = rest.partition("/")
    if last:
        return label(prefix), f"{label(prefix)}, {label(last).lower()}", first
    if prefix in ONE_CHART and not first.endswith(("accuracies", "accuracy", "std")):
        return label(prefix), label(prefix), first
    return label(prefix), label(first), ""


def _order(group: str, chart: str) -> tuple[int, int, str, str]:
    groups = ("Learning", "Rewards", "Objective")
    place = groups.index(group) if group in groups else len(groups) + (group == "Speed and memory")
    return place, FIRST.index(chart) if chart in FIRST else len(FIRST), group, chart


def _constant(record: RunRecord, curves: Sequence[tuple[str, str, str]]) -> float | None:
    """The one value of all curves of a chart, if they have only one."""
    values = {value for split, name, _ in curves for value in record.series(split, name)[1]}
    return values.pop() if len(values) == 1 else None


def _charts(
    record: RunRecord, chart: str, curves: Sequence[tuple[str, str, str]], heading: str, first: bool
) -> Iterable[Figure]:
    """One chart, or several when there are more curves than colours."""
    splits = {split for split, _, _ in curves}
    wide = first and heading == "Learning"
    size = (1080, 240) if wide else (520, 240) if heading in MAIN_GROUPS else (340, 190)
    for start in range(0, len(curves), COLOURS):
        lines = []
        for split, name, curve in curves[start : start + COLOURS]:
            steps, values = record.series(split, name)
            parts = [part for part in (curve, split if len(splits) > 1 or split != "train" else "") if part]
            lines.append(Line(", ".join(parts) or label(name), steps, values, dashed=bool(curve) and split != "train"))
        yield Figure(label(chart), _chart(chart, lines, size), wide)


def _chart(chart: str, lines: Sequence[Line], size: tuple[int, int]) -> str:
    values = solids([value for line in lines for value in line.y])
    points = max(len(line.y) for line in lines)
    smoothing = max(0.0, min(0.95, 1 - 48 / points))
    spread = chart in LOGARITHMIC and min(values) > 0 and max(values) / min(values) > 50
    return line_chart(lines, title=label(chart), width=size[0], height=size[1], smoothing=smoothing, log_y=spread)
