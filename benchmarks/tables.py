"""The results as tables and plots: python benchmarks/tables.py

Writes what follows the mark in README.md, and two plots of `sft_run.jsonl`. Of rows that were measured more than once on one kind of card, the newest counts;
what a row was measured beside is in its `command`. `scripts/generated.py --check` says whether the page is up to date.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.reporting.palette import standalone
from aligntune.reporting.svg_blocks import bar_chart

HERE = Path(__file__).parent
MARK = "<!-- What follows is written by tables.py -->\n"
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """One file of results. `keys` name a row (with its card), `numbers` are what was measured: title -> column and how it is written."""

    title: str
    file: str
    keys: Sequence[str]
    numbers: dict[str, tuple[str, Callable[[Any], str]]]


def thousands(value: float) -> str:
    return f"{value / 1000:.1f}k"


def digits(count: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{count}f}"


def last(values: Sequence[float]) -> str:
    return f"{values[-1]:.2f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


SPEED = {"tokens/s": ("tokens_per_s", thousands)}
PEAK = {"peak GiB": ("peak_gib", digits(1))}
TABLES = (
    Table("Fine-tuning, whole trainers", "sft_run", ("shape", "arm"), SPEED | PEAK | {"last loss": ("losses", last)}),
    Table("A fine-tuning step without a trainer", "sft_step", ("shape", "arm"), SPEED | PEAK),
    Table("DPO", "dpo_step", ("shape", "arm"), SPEED | PEAK),
    Table(
        "A GRPO step", "grpo_run", ("shape", "arm", "completions", "new"),
        {"step, s": ("step_s", digits(2)), "rollout": ("rollout_seconds", digits(2)), "update": ("update_seconds", digits(2))} | PEAK,
    ),
    Table("Rollouts", "rollouts", ("shape", "arm", "rows", "new"), SPEED | PEAK | {"mismatch, nats": ("mismatch_nats", digits(3))}),
    Table(
        "Several GPUs", "several", ("shape", "task", "gpus"),
        SPEED | PEAK | {"efficiency": ("efficiency", percent), "largest loss difference": ("largest_loss_difference", digits(4))},
    ),
    Table("Backends, the same config", "backends", ("shape", "task", "backend"), SPEED | PEAK),
    Table("Losses and log-probabilities without logits", "linear_loss", ("arm", "tokens"), {"ms": ("ms", digits(1)), "peak GiB": ("peak_gib", digits(2))}),
)  # fmt: skip
PLOTS = {
    "sft_speed.svg": ("tokens_per_s", "thousand tokens a second", 1000),
    "sft_memory.svg": ("peak_gib", "peak GiB", 1),
}
PLOTTED = {
    "native": "AlignTune", "split16": "AlignTune, split weights", "trl-pack-liger": "TRL, packing, Liger", "unsloth-pack": "Unsloth, packing",
    "lora": "AlignTune, LoRA", "lora-half": "AlignTune, LoRA, half", "lora-mlp": "AlignTune, LoRA, mlp",
    "trl-pack-liger-lora": "TRL, LoRA, packing, Liger", "unsloth-lora": "Unsloth, LoRA, packing",
}  # fmt: skip
"""Arms of `sft_run.py` -> names in the plots."""


def newest(file: str, keys: Sequence[str]) -> list[Row]:
    """The last row for each value of `keys` on each kind of card, shape by shape; runs that failed are left out."""
    lines = (HERE / "results" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "failed" not in row]
    found = {(*(row.get(key) for key in keys), row["card"]): row for row in rows}
    return sorted(found.values(), key=lambda row: (row["card"] == "cpu", row.get("shape", ""), row["card"]))


def markdown(table: Table) -> str:
    rows = newest(table.file, table.keys)
    shown = {title: how for title, how in table.numbers.items() if any(row.get(how[0]) for row in rows)}
    head = [*table.keys, *shown, "card", "versions"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(table.keys) + "---:|" * len(shown) + "---|---|"]
    for row in rows:
        numbers = [write(row[name]) if row.get(name) else "" for name, write in shown.values()]
        named = [str(row.get(key, "")) for key in table.keys]
        lines.append(f"| {' | '.join([*named, *numbers, row['card'], versions(row)])} |")
    return f"### {table.title}\n\n`results/{table.file}.jsonl`\n\n" + "\n".join(lines) + "\n"


def versions(row: Row) -> str:
    return f"torch {row['torch'].partition('+')[0]}, transformers {row['transformers']}"


def plot(column: str, unit: str, scale: float) -> str:
    """Bars for the arms of `sft_run.py` at 0.5B on an H100."""
    rows = {row["arm"]: row for row in newest("sft_run", ("shape", "arm")) if row["shape"] == "0.5b" and "H100" in row["card"]}  # fmt: skip
    arms = [arm for arm in PLOTTED if arm in rows]
    return standalone(bar_chart([PLOTTED[arm] for arm in arms], {unit: [rows[arm][column] / scale for arm in arms]}, title=f"Fine-tuning, 0.5B, H100: {unit}"))  # fmt: skip


def page() -> str:
    """README.md with its tables."""
    kept = (HERE / "README.md").read_text(encoding="utf-8").partition(MARK)[0]
    return kept + MARK + "\n" + "\n".join(map(markdown, TABLES))


if __name__ == "__main__":
    (HERE / "README.md").write_text(page(), encoding="utf-8")
    for name, how in PLOTS.items():
        (HERE / "results" / name).write_text(plot(*how), encoding="utf-8")
