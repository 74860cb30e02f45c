"""Which rewards are there? Rows for `aligntune reward list` and the page of the docs, from the registry itself."""

from __future__ import annotations

from typing import Any

from . import base
from .base import Example, Reward, describe
from .samples import completion_text

CHECKED_BY = {True: "heuristic", False: "defined"}


def rows() -> list[dict[str, Any]]:
    """One dict per registered reward (see `describe`), with its examples, sorted by name."""
    return [
        describe(name) | {"examples": [_example(example) for example in base.get(name).examples]}
        for name in base.names()
    ]


def _example(example: Example) -> dict[str, Any]:
    return {
        "kind": example.kind,
        "completion": example.completion if isinstance(example.completion, str) else list(example.completion),
        "score": example.score,
        "note": example.note,
    }


def markdown() -> str:
    """A table of all rewards, then each with its definition, columns, params and examples."""
    found = [base.get(name) for name in base.names()]
    lines = ["| reward | measures | range | kind |", "|---|---|---|---|"]
    lines += [
        f"| [`{item.name}`](#{item.name}) | {_cell(item.summary)} | {_range(item)} | {CHECKED_BY[item.heuristic]} |"
        for item in found
    ]
    return "\n".join([*lines, "", *(_section(item) for item in found)])


def _range(item: Reward) -> str:
    low, high = ("" if bound is None else f"{bound:g}" for bound in item.range)
    return f"{low} to {high}" if low or high else "any"


def _section(item: Reward) -> str:
    described = describe(item)
    lines = [f"### {item.name}", "", _docstring(item), ""]
    facts = {
        "Source": item.source,
        "Also called": ", ".join(f"`{alias}`" for alias in item.aliases),
        "Columns": ", ".join(f"`{name}`" for name in described["columns"]),
        "Params": ", ".join(f"`{name}`: `{value!r}`" for name, value in described["params"].items()),
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += ["", "| example | completion | scores |", "|---|---|---|"]
    for example in item.examples:
        kind = f"{example.kind} ({example.note})" if example.note else example.kind
        lines.append(f"| {kind} | {_code(completion_text(example.completion))} | {_score(example)} |")
    return "\n".join([*lines, ""])


def _docstring(item: Reward) -> str:
    import inspect

    return inspect.getdoc(item.function) or ""


def _score(example: Example) -> str:
    if example.score is None:
        return "does not apply"
    if isinstance(example.score, tuple):
        return f"{example.score[0]:g} to {example.score[1]:g}"
    return f"{example.score:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str, width: int = 90) -> str:
    """A completion on one line of a table, without the signs that a table or a code span would take for its own."""
    line = text.replace("\n", "⏎").replace("`", "'").replace("|", "¦")
    short = line if len(line) <= width else line[:width] + "…"
    return f"`{short}`" if short.strip() else "(empty)"
