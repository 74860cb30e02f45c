"""Arms of a benchmark: processes one after another, so that neither their steps nor their compilations disturb each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def trained_rows(session: Any, output: Path) -> list[dict[str, Any]]:
    """Train a session, and read the training rows of its trail."""
    session.train(overwrite=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


@contextmanager
def parts(given: str | None, write: Callable[[Path], None]) -> Iterator[Path]:
    """The folder with model and data: `given`, where an earlier call left them or this one does, else one for this call alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(given or name)
        if not (folder / "prompts.jsonl").exists():
            folder.mkdir(exist_ok=True)
            write(folder)
        yield folder


def ended(commands: Mapping[str, Sequence[str]], folder: Path, limit: float) -> Iterator[tuple[str, str | None]]:
    """Run the commands in turn, each at most `limit` seconds; (name, None) or (name, why it failed) as each ends."""
    for name, command in commands.items():
        log = folder / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                kill_group(process)
        said = log.read_text()[-2500:]
        yield name, None if code == 0 else f"not done after {limit:.0f} s: {said}" if code is None else said


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started (compilers' workers outlive it)."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
