"""Which colours do page and drawings share? One set for light and one for dark, as CSS variables."""

from __future__ import annotations

LIGHT = (
    "--paper:#fbfaf8;--card:#ffffff;--ink:#1d1c1a;--muted:#6b675f;--rule:#e9e6e0;--axis:#b9b4aa;--wash:#f3f1ec;"
    "--good:#1d7a55;--bad:#b3362f;--warn:#97660b;"
    "--series-0:#2f62c9;--series-1:#cf6a1d;--series-2:#1d8a72;--series-3:#8757bf;"
    "--series-4:#c13f63;--series-5:#7d7a15;--series-6:#3f8fb5;--series-7:#8a6f5a"
)
DARK = (
    "--paper:#161614;--card:#1d1d1a;--ink:#ebe8e1;--muted:#a09b90;--rule:#2e2d29;--axis:#57544d;--wash:#22221f;"
    "--good:#62c99b;--bad:#f08a80;--warn:#e3b04b;"
    "--series-0:#7da6ff;--series-1:#f0a060;--series-2:#57c7ab;--series-3:#c49af0;"
    "--series-4:#f2809f;--series-5:#c9c552;--series-6:#7cc6e8;--series-7:#c9ac94"
)
"""The series colours hold 3:1 contrast or better on their paper and stay apart for colour-blind readers."""

SANS = "--sans:system-ui,-apple-system,'Segoe UI',Inter,'Helvetica Neue',Arial,sans-serif"

DRAWING = """
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}.line.faint{stroke-width:1;opacity:.3}
.line.dashed{stroke-dasharray:5 4}.band{opacity:.16;stroke:none}.gridline{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--axis);stroke-width:1}.tick,.label,.key{font:11px var(--sans);fill:var(--muted)}
.tick{font-variant-numeric:tabular-nums}.key,.strong{fill:var(--ink)}.hit{fill:transparent}.hit:hover{fill:var(--ink)}
.cell{fill:var(--series-0)}.cell.negative{fill:var(--series-1)}.cell.none{fill:var(--rule)}.on{fill:var(--paper)}
""" + "".join(
    f".line.series-{i}{{stroke:var(--series-{i})}}.fill.series-{i},.band.series-{i}{{fill:var(--series-{i})}}\n"
    for i in range(8)
)
"""The rules that drawings need."""


def variables() -> str:
    """The variables for `:root`, following the reader's preference for light or dark."""
    return f":root{{color-scheme:light dark;{SANS};{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"


def standalone(svg: str) -> str:
    """A drawing as a file of its own (for a README or a paper), light or dark with its viewer."""
    style = f"svg{{{SANS};{LIGHT}}}@media (prefers-color-scheme:dark){{svg{{{DARK}}}}}{DRAWING}"
    head, rest = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}'
