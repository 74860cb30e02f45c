"""How are curves drawn? Line charts and sparklines as inline SVG, in plain Python (bars and matrices: `svg_blocks`).

Every drawing carries a title and a description for screen readers, and takes its colours from CSS classes (`series-0`
to `series-7`, `axis`, `grid`, ...) so that one page serves light and dark; `palette.standalone` adds them to a
drawing that leaves the page. Coordinates are in user units, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from aligntune.reporting.scales import (
    LONG,
    TINY,
    Numbers,
    Scale,
    finite,
    fixed,
    log_ticks,
    means,
    nice_ticks,
    path,
    roughness,
    smooth,
    solids,
    thin,
    tick_labels,
)
from aligntune.reporting.text import number

COLOURS = 8
MAX_HOVER = 160  # points of a curve that answer to the pointer
MAX_DOTS = 32  # a curve of at most this many points shows each
MIN_SMOOTH = 24  # a curve of fewer points is not smoothed,
ROUGH = 0.01  # nor one that is smooth by itself
CHAR = 6.1  # average width of a character at 11 px in the page's sans serif


@dataclass(frozen=True)
class Line:
    """One curve. NaN, infinities and None are gaps. `low`/`high` bound a band; `faint` draws it in the background."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False
    faint: bool = False
    colour: int = -1
    """Index of the series colour; -1 takes the line's place in the chart."""


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    width: int = 520,
    height: int = 240,
    smoothing: float = 0.0,
    log_y: bool = False,
) -> str:
    """Curves over a common x. With `smoothing` in (0, 1) a noisy curve is faint and its moving average strong.

    `log_y` falls back to a linear axis when no value is positive. Without a finite value the chart says so.
    """
    lines = [
        replace(line, colour=index if line.colour < 0 else line.colour)
        for index, line in enumerate(lines)
        if any(finite(value) for value in line.y)
    ]
    if not lines:
        return empty(title, width, height)
    whole, lines = lines, [_extremes(line) for line in lines]
    values = [value for line in lines for part in (line.y, line.low or (), line.high or ()) for value in part]
    ticks, labels, log_y = _y_ticks(solids(values), log_y)
    left = 14 + max(len(text) for text in labels) * CHAR
    top = 12 + (18 * _legend_rows(lines, width - left) if len(lines) > 1 else 0)
    low, high = _x_range(solids([value for line in lines for value in line.x]))
    x = Scale(low, high, left, width - 14)
    y = Scale(ticks[0], ticks[-1], height - 32, top, log_y)
    body = [_y_axis(ticks, labels, y, left, width - 14), _x_axis(x, height - 32, x_label)]
    body += [_draw(line, x, y) for line in _with_smoothing(whole, lines, smoothing)]
    body += [_hover(line, x, y) for line in lines]
    if len(lines) > 1:
        body.append(legend(lines, left, width))
    return drawing(title, describe(lines, x_label), width, height, "".join(body))


def sparkline(values: Numbers, *, title: str, width: int = 120, height: int = 28) -> str:
    """A curve without axes, its end marked; nothing for fewer than two values."""
    points = thin(range(len(values)), values, 120)
    solid = [(at, value) for at, value in points if value is not None]
    if len(solid) < 2:
        return ""
    low, high = min(value for _, value in solid), max(value for _, value in solid)
    x = Scale(0, len(values) - 1, 3, width - 4)
    y = Scale(low, high if high > low else low + 1, height - 4, 4)
    (_, first), (at, last) = solid[0], solid[-1]
    body = (
        f'<path class="line series-0" d="{path(points, x, y)}"/>'
        f'<circle class="fill series-0" cx="{fixed(x(at))}" cy="{fixed(y(last))}" r="2.5"/>'
    )
    return drawing(title, f"From {number(first)} to {number(last)}.", width, height, body, natural=True)


def describe(lines: Sequence[Line], x_label: str) -> str:
    """One sentence per curve for those who cannot see it."""
    parts = []
    for line in lines:
        solid = [(at, value) for at, value in zip(line.x, line.y, strict=True) if finite(at) and finite(value)]
        if solid:
            (first, start), (last, end) = solid[0], solid[-1]
            lowest, highest = min(value for _, value in solid), max(value for _, value in solid)
            parts.append(
                f"{line.name}: {number(start)} at {x_label} {number(first)}, {number(end)} at {x_label} {number(last)}, "
                f"lowest {number(lowest)}, highest {number(highest)}."
            )
    return " ".join(parts)


# --- parts that `svg_blocks` shares -----------------------------------------------------------------------------


def drawing(title: str, description: str, width: float, height: float, body: str, natural: bool = False) -> str:
    """The svg element: as wide as its column, or in its natural size."""
    size = f'width="{width}" height="{height}"' if natural else 'width="100%"'
    return (
        f'<svg viewBox="0 0 {width} {height}" {size} role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body}</svg>"
    )


def empty(title: str, width: int, height: int) -> str:
    """A drawing that says there is nothing to draw."""
    text = words(width / 2, height / 2, "no finite value yet", kind="label", anchor="middle")
    return drawing(title, "No finite value to draw.", width, height, text)


def words(x: float, y: float, text: str, *, kind: str = "tick", anchor: str = "start", turn: int = 0) -> str:
    """Text at a point, turned by `turn` degrees around it."""
    rotate = f' transform="rotate({turn} {fixed(x)} {fixed(y)})"' if turn else ""
    return f'<text class="{kind}" text-anchor="{anchor}" x="{fixed(x)}" y="{fixed(y)}"{rotate}>{escape(text)}</text>'


def legend(lines: Sequence[Line], left: float, width: float) -> str:
    """A swatch and a name for each line, in rows from the top."""
    body = []
    places = _legend_places(lines, width - left)
    for index, (line, (at, row)) in enumerate(zip(lines, places, strict=True)):
        colour, y = index if line.colour < 0 else line.colour, 12 + 18 * row
        swatch = f'<path class="{_style(line, colour)}" d="M{fixed(left + at)},{y - 4}h16"/>'
        body.append(swatch + words(left + at + 21, y, line.name, kind="key"))
    return "".join(body)


# --- parts of a line chart --------------------------------------------------------------------------------------


def _y_ticks(values: Sequence[float], log_y: bool) -> tuple[list[float], list[str], bool]:
    positive = [value for value in values if value > TINY]
    if log_y and positive:
        ticks = log_ticks(min(positive), max(positive))
        return ticks, [number(tick, 3) for tick in ticks], True
    ticks = nice_ticks(min(values), max(values))
    return ticks, tick_labels(ticks), False


def _x_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 1, high + 1
    return (0, high) if 0 < low <= high / 20 else (low, high)  # steps from 1 or 10 begin at 0


def _extremes(line: Line) -> Line:
    """A long curve by what can be seen of it."""
    if len(line.y) <= LONG or line.low is not None:
        return line
    points = thin(line.x, line.y, LONG)
    return replace(line, x=[at for at, _ in points], y=[value for _, value in points])


def _with_smoothing(whole: Sequence[Line], lines: Sequence[Line], weight: float) -> list[Line]:
    """`lines` as drawn; what is smoothed is `whole`, of which long ones among `lines` have the extremes alone."""
    drawn = []
    for every, line in zip(whole, lines, strict=True):
        if not weight or sum(map(finite, line.y)) < MIN_SMOOTH or roughness(line.y) < ROUGH:
            drawn.append(line)
        else:
            at, values = (every.x, every.y) if every is line else means(every.x, every.y)
            drawn += [replace(line, faint=True), replace(line, x=at, y=smooth(values, weight), low=None, high=None)]
    return drawn


def _style(line: Line, colour: int) -> str:
    extra = (" faint" if line.faint else "") + (" dashed" if line.dashed or colour >= COLOURS else "")
    return f"line series-{colour % COLOURS}{extra}"


def _draw(line: Line, x: Scale, y: Scale) -> str:
    kind = f"series-{line.colour % COLOURS}"
    band = _band(line, x, y)
    shade = f'<path class="band {kind}" d="{band}"/>' if band else ""
    curve = f'<path class="{_style(line, line.colour)}" d="{path(thin(line.x, line.y), x, y)}"/>'
    pairs = zip(line.x, line.y, strict=True)
    solid = [(at, value) for at, value in pairs if finite(at) and y.shows(value)]
    if line.faint or len(solid) > MAX_DOTS:
        return shade + curve
    dots = (f'<circle class="fill {kind}" cx="{fixed(x(at))}" cy="{fixed(y(value))}" r="2.2"/>' for at, value in solid)
    return shade + curve + "".join(dots)


def _band(line: Line, x: Scale, y: Scale) -> str:
    if line.low is None or line.high is None:
        return ""
    edges = zip(line.x, line.low, line.high, strict=True)
    solid = [(at, low, high) for at, low, high in edges if finite(at) and y.shows(low) and y.shows(high)]
    if len(solid) < 2:
        return ""
    there = path([(at, high) for at, _, high in solid], x, y)
    back = path([(at, low) for at, low, _ in reversed(solid)], x, y)
    return f"{there}L{back[1:]}Z"


def _y_axis(ticks: Sequence[float], labels: Sequence[str], y: Scale, left: float, right: float) -> str:
    return "".join(
        f'<line class="gridline" x1="{fixed(left)}" x2="{fixed(right)}" y1="{fixed(y(tick))}" y2="{fixed(y(tick))}"/>'
        + words(left - 7, y(tick) + 3.5, text, anchor="end")
        for tick, text in zip(ticks, labels, strict=True)
    )


def _x_axis(x: Scale, bottom: float, name: str) -> str:
    ticks = [tick for tick in nice_ticks(x.low, x.high, 6) if x.low <= tick <= x.high]
    end = f"{name} {number(x.high)}"
    room = x.end - (len(end) + 3) * CHAR
    body = [f'<line class="axis" x1="{fixed(x.start)}" x2="{fixed(x.end)}" y1="{fixed(bottom)}" y2="{fixed(bottom)}"/>']
    labels = zip(ticks, tick_labels(ticks or [1.0]), strict=False)
    body += [words(x(tick), bottom + 16, text, anchor="middle") for tick, text in labels if x(tick) < room]
    body.append(words(x.end, bottom + 16, end, anchor="end"))
    return "".join(body)


def _hover(line: Line, x: Scale, y: Scale) -> str:
    """Invisible points whose native tooltip reads the number: no script needed."""
    return "".join(
        f'<circle class="hit" cx="{fixed(x(at))}" cy="{fixed(y(value))}" r="4">'
        f"<title>{escape(line.name)} at {number(at)}: {number(value)}</title></circle>"
        for at, value in thin(line.x, line.y, MAX_HOVER)
        if y.shows(value)
    )


def _legend_places(lines: Sequence[Line], room: float) -> list[tuple[float, int]]:
    places, at, row = [], 0.0, 0
    for line in lines:
        wide = 36 + len(line.name) * CHAR
        if at and at + wide > room:
            at, row = 0.0, row + 1
        places.append((at, row))
        at += wide
    return places


def _legend_rows(lines: Sequence[Line], room: float) -> int:
    return _legend_places(lines, room)[-1][1] + 1
