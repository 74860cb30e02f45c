"""What can a report section hold? Six kinds, each built by one function that checks its shape.

Evaluation, rewards and algorithms extend the report with `recorder.section(kind, title, payload)`; the page draws each
kind without knowing what it means. A confusion matrix is a `matrix`, a learned mirror map a `series` over its own x,
fitness with its spread a `series` with `low` and `high`, a per-class table a `table`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Numbers = Sequence[float | None]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> dict[str, Any]:
    """Rows of cells under named columns. Numbers are set right-aligned, the rest as text."""
    _same_length({"columns": columns, **{f"row {index}": row for index, row in enumerate(rows)}})
    return {"columns": list(columns), "rows": [list(row) for row in rows], "note": note}


def curve(name: str, x: Numbers, y: Numbers, low: Numbers | None = None, high: Numbers | None = None) -> dict[str, Any]:
    """One line of a `series`. `low` and `high` bound a shaded band (quartiles, minimum and maximum, ...)."""
    given = {"x": x, "y": y, "low": low, "high": high}
    _same_length({key: values for key, values in given.items() if values is not None})
    return {
        "name": name,
        "x": list(x),
        "y": list(y),
        "low": None if low is None else list(low),
        "high": None if high is None else list(high),
    }


def series(
    curves: Sequence[Mapping[str, Any]], x_label: str = "step", y_label: str = "", log_y: bool = False, note: str = ""
) -> dict[str, Any]:
    """Lines over a common axis, each made by `curve`. None and NaN are gaps. `log_y` needs positive values."""
    lines = [curve(line["name"], line["x"], line["y"], line.get("low"), line.get("high")) for line in curves]
    return {"curves": lines, "x_label": x_label, "y_label": y_label, "log_y": log_y, "note": note}


def bars(labels: Sequence[str], values: Numbers | Mapping[str, Numbers], note: str = "") -> dict[str, Any]:
    """One bar per label, or one group of bars per label when `values` maps group members to their numbers."""
    groups = dict(values) if isinstance(values, Mapping) else {"": values}
    _same_length({"labels": labels, **{f"group {name}": group for name, group in groups.items()}})
    return {"labels": list(labels), "values": {name: list(group) for name, group in groups.items()}, "note": note}


def matrix(
    values: Sequence[Numbers],
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str = "",
    column_label: str = "",
    note: str = "",
) -> dict[str, Any]:
    """A heat map; `values[i][j]` is row i, column j. A confusion matrix has the true label in rows."""
    _same_length({"rows": rows, "values": values})
    _same_length({"columns": columns, **{f"row {index}": row for index, row in enumerate(values)}})
    return {
        "values": [list(row) for row in values],
        "rows": list(rows),
        "columns": list(columns),
        "row_label": row_label,
        "column_label": column_label,
        "note": note,
    }


def text(content: str, note: str = "") -> dict[str, Any]:
    """Plain text; line breaks are kept."""
    return {"content": content, "note": note}


def samples(items: Sequence[Mapping[str, Any]], note: str = "") -> dict[str, Any]:
    """Texts to read, each a mapping of field name to text or number."""
    return {"items": [dict(item) for item in items], "note": note}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "table": table,
    "series": series,
    "bars": bars,
    "matrix": matrix,
    "text": text,
    "samples": samples,
}


def checked(kind: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """`payload` with its kind's defaults. Raises `ValueError` for an unknown kind or a payload of another shape."""
    if kind not in KINDS:
        raise ValueError(f"unknown section kind '{kind}'; choose one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](**payload)
    except (TypeError, KeyError) as error:
        raise ValueError(f"a section of kind '{kind}' cannot be made from {sorted(payload)}: {error}") from error


def _same_length(parts: Mapping[str, Sequence[Any]]) -> None:
    sizes = {name: len(value) for name, value in parts.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"parts of a section must have one length: {listed}")
