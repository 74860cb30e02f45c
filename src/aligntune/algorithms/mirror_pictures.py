"""What does a mirror map look like? Curves for the report, as plain data: the divergence, and for the neural map h' and h."""

from __future__ import annotations

from typing import Any

import torch

from aligntune.algorithms.mirror_map import Divergence, MirrorMap

REFERENCES = (0.1, 0.5, 0.9)
"""Reference probabilities whose divergence is drawn."""
POINTS = 60


def mirror_sections(divergence: Divergence, mirror: MirrorMap | None = None, title: str = "") -> list[dict[str, Any]]:
    """Report sections (`kind`, `title`, `group`, `payload`): D(p, q) over p for three q; h'(y) and h(y) of a neural map."""
    y = torch.linspace(0.01, 0.99, POINTS, dtype=torch.float64)
    p = y.tolist()
    with torch.no_grad():
        curves = [_curve(f"q = {q}", p, divergence(y.log(), torch.full_like(y, q).log())) for q in REFERENCES]
        found = [_section(f"{title}Divergence of policy p from reference q", curves, "D(p, q)")]
        if mirror is not None:
            slope, potential = mirror.slope(y), mirror.potential(y)
            found.append(_section(f"{title}Mirror map h'(y)", [_curve("h'", p, slope)], "h'(y)"))
            found.append(_section(f"{title}Potential h(y)", [_curve("h", p, potential - potential[-1])], "h(y) - h(1)"))
    return found


def _curve(name: str, x: list[float], y: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "x": x, "y": y.tolist()}


def _section(title: str, curves: list[dict[str, Any]], label: str) -> dict[str, Any]:
    payload = {"curves": curves, "x_label": "probability of the token", "y_label": label}
    return {"kind": "series", "title": title, "group": "Mirror map", "payload": payload}
