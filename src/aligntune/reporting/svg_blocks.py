"""How are bars and matrices drawn? Horizontal bar charts and heat maps; see `svg` for the drawing conventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from aligntune.reporting.scales import Numbers, Scale, finite, fixed
from aligntune.reporting.svg import CHAR, COLOURS, Line, drawing, empty, legend, words
from aligntune.reporting.text import number

BAR = 16  # height of one bar with its gap
CELL = 46  # side of a matrix cell
NAME_LIMIT = 18  # characters of a row or column name


def bar_chart(labels: Sequence[str], groups: Mapping[str, Numbers], *, title: str, width: int = 520) -> str:
    """Horizontal bars from zero with their numbers: one row per label, one bar in it per group."""
    values = [value for group in groups.values() for value in group if finite(value)]
    if not values:
        return empty(title, width, 80)
    left = min(width * 0.4, 12 + max(len(text) for text in labels) * CHAR)
    top = 24 if len(groups) > 1 else 4
    row = BAR * len(groups) + 10
    low, high = min(0.0, *values), max(0.0, *values)
    scale = Scale(low, high if high > low else low + 1, left + (46 if low < 0 else 0), width - 52)
    height = top + row * len(labels) + 4
    body = []
    for index, text in enumerate(labels):
        y = top + index * row
        body.append(words(left - 8, y + row / 2 - 1, _cut(text, int(left / CHAR) - 1), anchor="end"))
        for order, (name, group) in enumerate(groups.items()):
            value = group[index]
            if finite(value):
                body.append(_bar(value, scale, y + order * BAR, order, f"{text} {name}".strip()))
    zero = fixed(scale(0.0))
    body.append(f'<line class="axis" x1="{zero}" x2="{zero}" y1="{top - 2}" y2="{height - 6}"/>')
    if len(groups) > 1:
        body.append(legend([Line(name, (), ()) for name in groups], left, width))
    best = next(text for group in groups.values() for text, value in zip(labels, group) if value == max(values))
    text = f"{len(labels)} bars from {number(min(values))} to {number(max(values))}; highest: {best}."
    return drawing(title, text, width, height, "".join(body))


def matrix_chart(
    values: Sequence[Numbers],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_label: str = "",
    column_label: str = "",
) -> str:
    """A heat map with its numbers; the shade of a cell is its share of the largest absolute value."""
    sizes = [abs(value) for row in values for value in row if finite(value)]
    most = max(sizes, default=0.0)
    side = CELL if len(columns) <= 14 else max(14, 640 // len(columns))
    row_names, column_names = ([_cut(name, NAME_LIMIT) for name in names] for names in (rows, columns))
    left = 14 + _longest(row_names) + (18 if row_label else 0)
    steep = _longest(column_names) > side - 4
    top = (8 + 0.72 * _longest(column_names) if steep else 22) + (18 if column_label else 0)
    bottom = top + side * len(rows)
    body = [_column_name(name, left + side * (j + 0.5), top - 8, steep) for j, name in enumerate(column_names)]
    for i, name in enumerate(row_names):
        y = top + side * i
        body.append(words(left - 8, y + side / 2 + 4, name, anchor="end"))
        for j, value in enumerate(values[i]):
            body.append(_cell(value, left + side * j, y, side, most, f"{rows[i]} / {columns[j]}"))
    if column_label:
        body.append(words(left, 12, f"{column_label} →", kind="label"))
    if row_label:
        body.append(words(12, bottom, f"{row_label} →", kind="label", turn=-90))
    text = f"{len(rows)} by {len(columns)} matrix, largest absolute value {number(most)}."
    width = left + side * len(columns) + (40 if steep else 10)
    return drawing(title, text, round(width), round(bottom + 10), "".join(body), natural=True)


def _bar(value: float, scale: Scale, y: float, order: int, name: str) -> str:
    zero, end = scale(0.0), scale(value)
    box = f'x="{fixed(min(zero, end))}" y="{fixed(y)}" width="{fixed(max(1.0, abs(end - zero)))}" height="{BAR - 3}"'
    anchor, text_x = ("start", end + 5) if value >= 0 else ("end", end - 5)
    return (
        f'<rect class="fill series-{order % COLOURS}" {box} rx="2">'
        f"<title>{escape(name)}: {number(value)}</title></rect>"
        f"{words(text_x, y + BAR - 6, number(value, 3), kind='tick strong', anchor=anchor)}"
    )


def _column_name(name: str, x: float, y: float, steep: bool) -> str:
    return words(x, y, name, anchor="start", turn=-45) if steep else words(x, y, name, anchor="middle")


def _cell(value: float | None, x: float, y: float, side: float, most: float, name: str) -> str:
    box = f'x="{fixed(x)}" y="{fixed(y)}" width="{fixed(side - 2)}" height="{fixed(side - 2)}" rx="3"'
    if not finite(value):
        return f'<rect class="cell none" {box}/>'
    share = abs(value) / most if most else 0.0
    negative = " negative" if value < 0 else ""
    shade = (
        f'<rect class="cell{negative}" fill-opacity="{0.05 + 0.95 * share:.3f}" {box}>'
        f"<title>{escape(name)}: {number(value)}</title></rect>"
    )
    if side < 30:
        return shade
    kind = "tick on" if share > 0.55 else "tick strong"
    return shade + words(x + side / 2 - 1, y + side / 2 + 3, number(value, 3), kind=kind, anchor="middle")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(1, limit - 1)] + "…"


def _longest(names: Sequence[str]) -> float:
    return max((len(name) for name in names), default=1) * CHAR
