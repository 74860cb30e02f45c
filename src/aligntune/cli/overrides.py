"""How verbs take a config file and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigFile = Annotated[
    Path | None,
    typer.Argument(help="YAML file of the run. Settings may follow: section.name=value or --section.name value."),
]


def split(file: Path | None, extra: list[str]) -> tuple[Path | None, list[str]]:
    """A first argument that is an override (`name=value`, or `--name` before its value) is not a file."""
    if file is not None and ("=" in file.name or str(file).startswith("--")) and not file.exists():
        return None, [str(file), *extra]
    return file, extra
