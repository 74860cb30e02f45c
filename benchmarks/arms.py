"""Arms of a benchmark as processes that load side by side and train one after another."""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """The GPU to oneself."""
    with (folder / "turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def trained_rows(session: Any, folder: Path, output: Path) -> list[dict[str, Any]]:
    """Load a session, train it in its turn, and read the training rows of its trail."""
    session.train_rows, session.model  # noqa: B018  (load before the turn)
    with turn(folder):
        session.train(overwrite=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


def ended(commands: Mapping[str, Sequence[str]], folder: Path) -> Iterator[tuple[str, str | None]]:
    """Start all commands; (name, the end of its output if it failed) in the order in which they end, so that a call that is
    cut off keeps what it has."""
    running = {}
    for name, command in commands.items():
        log = (folder / f"{name}.log").open("w")
        running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    while running:
        time.sleep(0.2)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            failed = running.pop(name).returncode != 0
            yield name, (folder / f"{name}.log").read_text()[-2500:] if failed else None
