"""Who watches the started processes? Output is passed on; when one ends badly, on Ctrl-C, or when this one is told to stop, all are stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2
GRACE_SECONDS = 15.0
"""How long a process may take to end by itself after Ctrl-C, and then again after being told to terminate."""
LAST_LINES = 30
STARTER = "ALIGNTUNE_STARTER"
"""The variable that tells a process on this machine the id of the one that it must not outlive."""


class Processes:
    """The processes of a run, one command for each machine; leaving the `with` block leaves none behind."""

    def __init__(self, commands: Mapping[str, list[str]], environment: Mapping[str, str]) -> None:
        """The first command runs here, the others by ssh. `environment`: variables beside this process's own."""
        self._commands = commands
        self._environment = dict(environment)
        self._started: list[subprocess.Popen[Any]] = []
        self._readers: list[threading.Thread] = []
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)

    def __enter__(self) -> Processes:
        """Start them. Each leads a group of its own, so that a Ctrl-C reaches it once, from here."""
        piped = len(self._commands) > 1 or not _stdout_is_terminal()
        for place, (host, command) in enumerate(self._commands.items()):
            here = command if place == 0 else _over_ssh(host, command, self._environment)
            streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if piped else {}
            process = subprocess.Popen(
                here, env=os.environ | self._environment | {STARTER: str(os.getpid())}, start_new_session=True, text=piped, stdin=subprocess.DEVNULL, **streams,
            )  # fmt: skip
            self._started.append(process)
            if piped:
                reader = threading.Thread(target=self._pass_on, args=(process,), daemon=True)
                reader.start()
                self._readers.append(reader)
        return self

    def wait(self) -> int:
        """Return 0 when all ended well, else the first bad exit code, as soon as there is one."""
        running = list(self._started)
        while running:
            for process in list(running):
                code = process.poll()
                if code:
                    return code
                if code == 0:
                    running.remove(process)
            time.sleep(POLL_SECONDS)
        return 0

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        first = signal.SIGINT if kind in (KeyboardInterrupt, SystemExit) else signal.SIGTERM
        for wanted in (first, signal.SIGTERM, signal.SIGKILL):
            if not self._signal(wanted):
                break
            self._wait_until_ended(GRACE_SECONDS)
        for reader in self._readers:
            reader.join(timeout=5)

    def _signal(self, wanted: signal.Signals) -> bool:
        """Send to every group that still has a process; whether there was one."""
        found = False
        for process in self._started:
            try:
                os.killpg(process.pid, wanted)
            except (ProcessLookupError, PermissionError):
                continue
            found = True
        return found

    def _wait_until_ended(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(_group_lives(process) for process in self._started):
            time.sleep(POLL_SECONDS / 4)

    def _pass_on(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.last_lines.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()


def _group_lives(process: subprocess.Popen[Any]) -> bool:
    process.poll()  # reaps the leader, which would otherwise keep its group alive as a zombie
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _stdout_is_terminal() -> bool:
    return sys.stdout is sys.__stdout__ and sys.stdout is not None and sys.stdout.isatty()


def _over_ssh(host: str, command: list[str], environment: Mapping[str, str]) -> list[str]:
    variables = [f"{name}={value}" for name, value in environment.items()]
    return ["ssh", "-tt", host, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(['env', *variables, *command])}"]


def search_path() -> str:
    """This process's import path for a child, so that what can be imported here can be imported there."""
    return os.pathsep.join(os.path.abspath(entry or ".") for entry in sys.path)
