"""`doctor`: is this machine fit, and what should be installed?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    output: Annotated[Path, typer.Option(help="Folder in which runs are written.")] = Path("output"),
    smoke: Annotated[bool, typer.Option("--smoke/--no-smoke", help="Train a small model for 20 steps.")] = True,
) -> None:
    """Check versions, GPU, kernels, extras, hub, disk, and train for 20 steps. Exit code 1 when runs would fail."""
    from aligntune.doctor import advice, examine

    found = []
    for finding in examine(output, smoke=smoke):
        found.append(finding)
        print(f"{finding.state:<5} {finding.name:<16} {finding.text}", flush=True)
    if line := advice(found):
        print(f"\ninstall: {line}")
    if any(finding.state == "bad" for finding in found):
        raise typer.Exit(1)
