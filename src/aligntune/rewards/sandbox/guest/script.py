"""What does the process that runs a whole program do? Run it as `__main__` and leave as a program leaves.

Standard input, output and error are files of the caller's; what was printed is read when the process has ended. The
end is the interpreter's own, less the destruction of every object, which would cost more than the program: threads are
joined, `atexit` functions run, streams flushed.
"""

from __future__ import annotations

import atexit
import os
import random
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from . import wire


def main(channel: int) -> None:
    """Run the program that arrives as the first frame and end the process with its exit code."""
    random.seed(0)  # the same code gets the same verdict twice
    code = wire.receive(channel)["code"]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    at_exit: list[Callable[[], Any]] = []

    def register(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        at_exit.append(lambda: function(*args, **kwargs))
        return function

    atexit.register = register  # type: ignore[assignment]
    status = _status(lambda: exec(compile(code, "main.py", "exec"), vars(module)))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for function in reversed(at_exit):
        _status(function)
    for stream in (sys.stdout, sys.stderr):
        _status(stream.flush)
    os._exit(status)


def _status(run: Callable[[], object]) -> int:
    """The exit code that Python gives for how `run` ended; an exception is printed as Python prints it."""
    try:
        run()
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return int(leave.code or 0) & 0xFF
        sys.stderr.write(f"{leave.code}\n")
        return 1
    except BaseException:  # noqa: BLE001 - the program's own error is its output
        traceback.print_exc()
        return 1
    return 0
