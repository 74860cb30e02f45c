"""`plan`: memory, steps and disk of a run, before anything loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from aligntune.cli.overrides import TAKES_OVERRIDES, ConfigFile, split

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from aligntune.planning.plan import Plan


def add_to(app: typer.Typer) -> None:
    app.command("plan", context_settings=TAKES_OVERRIDES)(plan)


def plan(
    ctx: typer.Context,
    file: ConfigFile = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.1, help="GiB that the GPU has. Unset: what is free on the first visible one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in GiB.")] = False,
) -> None:
    """Predict peak memory and steps of a config, and what would make it fit. Exit code 1 when it does not."""
    from aligntune.planning.memory import GIB
    from aligntune.planning.plan import free_memory, make_plan

    source, overrides = split(file, ctx.args)
    card = free_memory() if gpu_memory is None else gpu_memory * GIB
    found = make_plan(source, overrides, card)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found)
    if found.fits is False:
        raise typer.Exit(1)


def _show(plan: Plan) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    found, training = plan.situation, plan.situation.training
    shape = training.shape
    console.print(
        f"{found.run.algorithm.value} of {shape.name}: {_number(shape.parameters)} parameters, {_number(training.trained_parameters)} trained"
    )
    console.print(
        f"assumed: {'; '.join([*found.notes, f'attention {found.attention}', 'every row at its longest'])}\n",
        style="dim",
    )
    console.print(_memory(plan))
    console.print()
    console.print(_steps(plan))
    console.print()
    _verdict(plan, console)


def _memory(plan: Plan) -> Table:
    from rich.table import Table

    from aligntune.planning.memory import CONTEXT, SLACK

    lines = plan.moments[plan.at]
    table = Table("GiB", "memory at its peak: " + plan.at, box=None, header_style="bold", pad_edge=False)
    for name, size in sorted(lines.items(), key=lambda line: -line[1]):
        table.add_row(_gib(size), name)
    table.add_row(_gib(CONTEXT), "CUDA context (allowance)")
    table.add_row(_gib(SLACK * sum(lines.values())), "blocks that cannot be used (allowance)")
    table.add_row(_gib(plan.needs), "needed", style="bold")
    for name, other in plan.moments.items():
        if name != plan.at:
            table.add_row(_gib(sum(other.values())), f"{name}, without allowances", style="dim")
    return table


def _steps(plan: Plan) -> Table:
    from rich.table import Table

    steps = plan.steps
    table = Table("count", "of", box=None, header_style="bold", pad_edge=False)
    table.add_row(
        _known(steps.rows), "rows" + ("" if steps.rows is not None else " (not a local file that can be counted)")
    )
    if steps.guessed:
        table.add_row(_known(steps.sequences), "packed sequences, estimated from the size of the file")
    table.add_row(_known(steps.global_batch), f"rows an optimiser step, at most {steps.tokens_per_step:,} tokens")
    if steps.rollouts is not None:
        r = steps.rollouts
        table.add_row(
            _known(r.completions),
            f"completions a rollout ({r.prompts} prompts), at most {r.completion_tokens:,} tokens; {r.passes} passes, {r.steps} steps",
        )
    if steps.evolution is not None:
        trainings, length = steps.evolution
        table.add_row(
            _known(trainings), f"trainings of the evolution at most, of {length:,} steps each, before the run's own:"
        )
    table.add_row(
        _known(steps.steps), "optimiser steps" + ("" if steps.steps is not None else ": set train.max_steps to know")
    )
    table.add_row(_known(steps.evaluations), "evaluations")
    table.add_row(_known(steps.checkpoints), f"checkpoints of {steps.checkpoint_bytes / 2**30:.2f} GiB" + _disk(plan))
    return table


def _disk(plan: Plan) -> str:
    steps = plan.steps
    if not steps.kept:
        return ""
    every = "all" if steps.kept == steps.checkpoints else str(steps.kept)
    return f", {every} kept: {steps.kept * steps.checkpoint_bytes / 2**30:.1f} GiB of disk"


def _verdict(plan: Plan, console: Console) -> None:
    if plan.card is None:
        console.print("no GPU is visible: --gpu-memory GIB says whether it fits one")
        return
    if plan.fits:
        console.print(f"fits: needs {_gib(plan.needs)} of {plan.card / 2**30:.1f} GiB", style="green")
        return
    assert plan.advice is not None
    console.print(f"does not fit: needs {_gib(plan.needs)} of {plan.card / 2**30:.1f} GiB", style="red")
    for change in plan.advice.changes:
        console.print(
            f"  saves {change.saves / 2**30:6.2f} GiB  {' '.join(map(_quoted, change.overrides))}   ({change.cost})"
        )
    end = (
        "fits"
        if plan.advice.fits
        else "still does not fit: take a smaller model, a larger GPU, or several (launch.strategy: fsdp2)"
    )
    console.print(f"with these it needs {_gib(plan.advice.peak)} GiB: {end}")


def _quoted(override: str) -> str:
    return f"'{override}'" if " " in override else override


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _known(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _number(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
