"""The `aligntune` command in this process, or in one that a signal may end: without the seconds that starting Python costs."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any
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


PRELOADED = [
    "aligntune.cli.main",
    "aligntune.trainers.sft",
    "aligntune.trainers.reward_model",
    "aligntune.backends.trl.sft",
]


def start(function: Callable[..., Any], *arguments: Any, output: str | os.PathLike[str] = os.devnull) -> BaseProcess:
    """`function(*arguments)` in a new process, what it prints in the file `output`. It is forked from one that has imported the
    libraries and done nothing else, so that all tests wait for those imports once; `function` is importable by name."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_alone, args=(function, arguments, os.fspath(output)), daemon=True)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where the first one looks for them
        process.start()
    return process


def _alone(function: Callable[..., Any], arguments: tuple[Any, ...], output: str) -> None:
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # every run collects garbage, and the libraries' millions of objects are none
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    function(*arguments)
