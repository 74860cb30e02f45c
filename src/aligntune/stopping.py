"""A run that is told to stop ends as by Ctrl-C: its `with` blocks close, and the processes that it started end with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""`kill`, a scheduler and `docker stop` send the first; a terminal that is closed the second."""
LOOK_SECONDS = 1.0


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `SystemExit(128 + signal)`.

    Left alone are signals that the process treats in a way of its own (`nohup` ignores SIGHUP), and threads other than the
    main one, in which Python hears no signals.
    """
    heard = SIGNALS if threading.current_thread() is threading.main_thread() else []
    heard = [each for each in heard if signal.getsignal(each) is signal.SIG_DFL]
    for each in heard:
        signal.signal(each, _raise)
    try:
        yield
    finally:
        for each in heard:
            signal.signal(each, signal.SIG_DFL)


def _raise(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def end_with(starter: int) -> None:
    """From a thread, end this process soon after process `starter` is gone, however it went: nobody waits for its work then."""
    threading.Thread(target=_watch, args=(starter,), daemon=True).start()


def _watch(starter: int) -> None:
    while _lives(starter):
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
