"""`data preview`: which tokens a config trains on."""

from __future__ import annotations

from typing import Annotated

import typer

from aligntune.cli.overrides import TAKES_OVERRIDES, ConfigFile, split

data_app = typer.Typer(help="Looking at data.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(data_app, name="data")


@data_app.command(context_settings=TAKES_OVERRIDES)
def preview(
    ctx: typer.Context,
    file: ConfigFile = None,
    rows: Annotated[int, typer.Option(help="Rows to show.", min=1)] = 3,
) -> None:
    """Show the tokens of the first rows, trained ones marked."""
    import sys

    from rich.console import Console

    from aligntune.api import create_trainer
    from aligntune.data.preview import coloured, plain

    source, overrides = split(file, ctx.args)
    console = Console()
    for tokens in create_trainer(source, overrides=overrides).preview(rows):
        if sys.stdout.isatty():
            console.print(coloured(tokens))
        else:
            print(plain(tokens))
        print()
