"""`backends`: who can run what, and why not. Works with nothing installed but the config's own packages."""

from __future__ import annotations

from typing import Annotated

import typer

from aligntune.cli.overrides import TAKES_OVERRIDES, ConfigFile, split


def add_to(app: typer.Typer) -> None:
    app.command("backends", context_settings=TAKES_OVERRIDES)(backends)


def backends(
    ctx: typer.Context,
    file: ConfigFile = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The docs page, without what this machine lacks.")
    ] = False,
) -> None:
    """Print which backend runs each algorithm, or this config, and why the others do not."""
    from aligntune.backends.matrix import answers, backends_page, chosen, matrix

    if markdown:
        print(backends_page(), end="")
        return
    source, overrides = split(file, ctx.args)
    if source is None and not overrides:
        rows = matrix()
    else:
        from aligntune.config.resolve import resolve

        run = resolve(source, overrides=overrides).config
        rows = {run.algorithm.value: answers(run)}
    width = max(len(name) for name in rows)
    for algorithm, found in rows.items():
        for place, answer in enumerate(found):
            name = algorithm if place == 0 else ""
            print(f"{name:<{width}}  {answer.backend:<8} {'yes' if answer.reason is None else 'no: ' + answer.reason}")
    if len(rows) == 1:
        print(f"auto takes {chosen(run) or 'none of them'}")
