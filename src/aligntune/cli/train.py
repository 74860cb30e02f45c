"""`train` and `quickstart`: from a config to a model and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aligntune.cli.overrides import TAKES_OVERRIDES, ConfigFile, split


def add_to(app: typer.Typer) -> None:
    app.command("train", context_settings=TAKES_OVERRIDES)(train)
    app.command("quickstart")(quickstart)


def train(
    ctx: typer.Context,
    file: ConfigFile = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Continue: 'auto' for the last checkpoint, or a checkpoint folder.", metavar="auto|PATH"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the results in the output folder.")] = False,
    launch: Annotated[
        str | None,
        typer.Option(
            help="Several processes: accelerate, torchrun, slurm, or a strategy (ddp, fsdp2, zero2, zero3).",
            metavar="HOW",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Load data, show the first row with its mask, and stop before training.")
    ] = False,
) -> None:
    """Train what the config says."""
    from aligntune.api import create_trainer

    source, overrides = split(file, ctx.args)
    if launch is not None:
        strategy = launch in ("ddp", "fsdp2", "zero2", "zero3")
        overrides = [*overrides, f"launch.launcher={'accelerate' if strategy else launch}"]
        overrides += [f"launch.strategy={launch}"] if strategy else []
    trainer = create_trainer(source, overrides=overrides)
    if dry_run:
        print(trainer.describe())
        return
    trainer.train(resume=resume, overwrite=overwrite)
    print(f"model:  {trainer.directory.model}\nreport: {trainer.directory.report}")


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("output/quickstart"),
    overwrite: Annotated[bool, typer.Option(help="Replace the results in the output folder.")] = True,
) -> None:
    """Fine-tune the small model that ships with the package: offline, on a CPU, in about half a minute of training."""
    from aligntune.quickstart.run import quickstart as run

    run(output, overwrite=overwrite)
