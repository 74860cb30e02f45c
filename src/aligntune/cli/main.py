"""`aligntune`: the verbs, and what happens when one fails."""

from __future__ import annotations

import errno
import os
import sys
from functools import cache
from typing import Annotated

import typer

from aligntune.errors import AlignTuneError
from aligntune.stopping import told_to_stop

app = typer.Typer(
    name="aligntune",
    help="Post-training for language models: one config, one command.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"aligntune {version('aligntune')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a verb. An error that the user can fix is one message on stderr and exit code 2; Ctrl-C is 130, SIGTERM 143."""
    _register()
    try:
        with told_to_stop():
            app()
    except AlignTuneError as error:
        print(f"aligntune: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if not _disk_is_full(error):
            raise
        print(f"aligntune: {error}. Make room on that disk, or write to another", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("aligntune: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _disk_is_full(error: Exception) -> bool:
    """Whether the file system said so; libraries that write weights pass it on as text in errors of their own."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)


@cache
def _register() -> None:
    from aligntune.cli import backends, config, data, doctor, evaluate, models, plan, reward, train

    train.add_to(app)
    config.add_to(app)
    plan.add_to(app)
    backends.add_to(app)
    doctor.add_to(app)
    data.add_to(app)
    models.add_to(app)
    evaluate.add_to(app)
    reward.add_to(app)


if __name__ == "__main__":
    main()
