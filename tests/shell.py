"""The `aligntune` command in this process: what a shell would get, without the seconds that starting Python costs."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from aligntune.cli import main as cli


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def aligntune(*arguments: object) -> Done:
    """Run the command's entry point with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["aligntune", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(code, out.getvalue(), err.getvalue())
