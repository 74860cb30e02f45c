"""`eval`: how good is a saved model on these rows, or on public benchmarks?"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from aligntune.cli.outputs import check_output
from aligntune.cli.overrides import TAKES_OVERRIDES


def add_to(app: typer.Typer) -> None:
    app.command("eval", context_settings=TAKES_OVERRIDES)(evaluate)


def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a run, a model or an adapter; or a hub name.")],
    data: Annotated[
        str | None, typer.Argument(help="File, folder or hub dataset. Settings may follow: section.name=value.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A task type, or 'preference'; unset, found from the model and the rows.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Names or module:function addresses, separated by commas.", metavar="NAMES")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.", metavar="TASKS")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many rows (of each harness task).", min=1)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for the predictions, one JSON object a line; unset: predictions.jsonl, or the next free number."
        ),
    ] = None,
) -> None:
    """Measure a model on rows of any format, and write every prediction."""
    from aligntune import api
    from aligntune.errors import ConfigError, require

    overrides = list(ctx.args)
    if data is not None and "=" in data and not Path(data).exists():
        overrides = [data, *overrides]
        data = None
    if data is None and harness is None:
        raise ConfigError("eval: name the rows to measure on (a file, folder or hub dataset), or --harness TASKS")
    if harness is not None:
        require("lm_eval", extra="harness", why="benchmark tasks")  # before the rows are measured
    if data is not None:
        path = output or _free("predictions")
        check_output(path)
        found = api.evaluate(model, data, task=task, metrics=_names(metrics), limit=limit, overrides=overrides)
        _show(f"{found.task}: {len(found.predictions)} rows", found.metrics, found.tables)
        found.write_predictions(path)
        summary = {"model": model, "data": data, "task": found.task, "rows": len(found.predictions), "metrics": found.metrics}  # fmt: skip
        path.with_suffix(".metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        print(f"predictions: {path}\nmetrics:     {path.with_suffix('.metrics.json')}")
    if harness is not None:
        report = api.evaluate_harness(model, _names(harness) or [], limit=limit, overrides=overrides)
        _show("lm-evaluation-harness", report.metrics, [], report.errors)


def _free(name: str) -> Path:
    """`name.jsonl` in the current folder, or `name-2.jsonl` and so on: an earlier evaluation is not written over."""
    names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
    return next(path for path in (Path(f"{each}.jsonl") for each in names) if not path.exists())


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _show(title: str, metrics: dict[str, float], tables: list[Any], errors: dict[str, float] | None = None) -> None:
    from rich.console import Console

    console = Console()
    columns = ["metric", "value", *(["standard error"] if errors is not None else [])]
    rows = [[name, value, *([errors.get(name, "")] if errors is not None else [])] for name, value in metrics.items()]
    for heading, names, lines in [(title, columns, rows), *tables]:
        console.print(f"\n{heading}", style="bold", highlight=False)
        console.print(_table(names, lines))


def _table(columns: list[str], rows: list[list[Any]]) -> Any:
    from rich.table import Table

    table = Table()
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    return table
