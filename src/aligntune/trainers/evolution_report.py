"""What does an evolution look like on the report page? Fitness by generation with its spread, what evolved, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.reporting import sections

GROUP = "Evolution"
SHOWN = 12
"""Evolved numbers that get a curve."""


def evolution_sections(
    history: Sequence[Mapping[str, Any]], start: Mapping[str, float], best: Mapping[str, float]
) -> list[dict[str, Any]]:
    """`history`: a record for each generation; `start` and `best`: the evolved numbers by name."""
    x = [record["generation"] for record in history]

    def column(name: str) -> list[Any]:
        return [record.get(name) for record in history]

    fitness = [
        sections.curve("centre", x, column("fitness")),
        sections.curve("candidates", x, column("candidates/mean"), column("candidates/min"), column("candidates/max")),
        sections.curve("best centre so far", x, column("best_fitness")),
    ]
    found = [
        _section("series", "Fitness by generation", sections.series(
            fitness, "generation", "fitness", note="The verifier's mean score of held-out prompts. Band: worst to best candidate.")),
        _section("table", "What evolved", sections.table(
            ["number", "as given", "best centre"], [[name, start[name], value] for name, value in best.items()],
            "Advantages compare answers, so that only the proportion of weights matters.")),
    ]  # fmt: skip
    weights = [name for name in start if name.endswith(".weight")][:SHOWN]
    if weights:
        curves = [
            sections.curve(name.removesuffix(".weight"), x, [record["numbers"][name] for record in history])
            for name in weights
        ]
        positive = all(value > 0 for line in curves for value in line["y"])
        payload = sections.series(curves, "generation", "weight", log_y=positive)
        found.append(_section("series", "Weights of the rewards by generation", payload))
    rows = [
        [name, sum(record[key] for record in history)]
        for name, key in (
            ("trainings", "cost/trainings"), ("of these failed candidates", "candidates/failed"), ("optimiser steps", "cost/steps"),
            ("tokens trained on", "cost/tokens"), ("seconds of training and judging, all processes", "perf/training_seconds"),
            ("seconds, start to end", "perf/seconds"),
        )
    ]  # fmt: skip
    return [
        *found,
        _section("table", "Cost of the evolution", sections.table(["", ""], [["generations", len(history)], *rows])),
    ]


def _section(kind: str, title: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "title": title, "group": GROUP, "payload": payload}
