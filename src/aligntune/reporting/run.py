"""Where does a run leave its files, and which of them can be trusted?

A run directory belongs to one run. `RunDirectory.create` refuses a directory that holds another run's results unless
told to continue it (`resume=`) or to replace it (`overwrite=True`, which removes the files named in `OWNED` and nothing
else). `status.json` says how each session of the run ended, so that nothing half-written passes as a result:

    running -> finished | failed | interrupted       (a killed process leaves "running": read as "killed")

While a session runs it holds a lock on `.lock`, which the operating system releases even after kill -9.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from aligntune.errors import AlignTuneError, ConfigError
from aligntune.reporting.trail import JsonLines, disk_errors, dumps, write_atomic

try:
    import fcntl
except ImportError:  # Windows has no record locks; two runs in one directory are then not noticed
    fcntl = None  # type: ignore[assignment]

TRAIL = ("metrics.jsonl", "samples.jsonl", "sections.jsonl")
OWNED = (
    *("config.yaml", "config.origins.json", "provenance.json", "status.json", "loggers.json", "report.html"),
    *(*TRAIL, "checkpoints", "model", "tensorboard"),
    *("evolution.json", "evolution.jsonl", "candidates.jsonl", "mirror_map.json"),
)
MARK = "aligntune.json"

_held: dict[Path, BinaryIO] = {}  # record locks are per process: a second one here would not block, and close the first


class RunDirectory:
    """The files of one run under `path`. The constructor only names them; `create` makes the directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.yaml"
        self.origins = self.path / "config.origins.json"
        self.provenance = self.path / "provenance.json"
        self.status = self.path / "status.json"
        self.loggers = self.path / "loggers.json"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.evolution = self.path / "evolution.json"
        """The state of an evolution (Meta-ES), which precedes the checkpoints."""
        self.metrics, self.samples, self.sections = (JsonLines(self.path / name) for name in TRAIL)
        self.resumed_from = 0
        """The step this session continues from; 0 for a new run."""

    @classmethod
    def create(
        cls, path: str | Path, *, resume: str | Path | int | None = None, overwrite: bool = False
    ) -> RunDirectory:
        """Make the directory ready for a session.

        `resume` is a checkpoint folder or a step: the trail is cut back to what it was when that checkpoint was saved,
        so that the continued run writes the same lines as one that was never killed. Step 0 starts the run again.
        Raises `ConfigError` when the disk refuses, another process writes there, or other results would be lost.
        """
        run = cls(path)
        run._make()
        if run.is_running():
            raise ConfigError(f"{run.path} is being written by another run; choose another output_dir, or wait for it")
        checkpoint = None if resume is None or isinstance(resume, int) else Path(resume).expanduser().absolute()
        step = resume if isinstance(resume, int) else None if checkpoint is None else checkpoint_step(checkpoint)
        if step is not None and (checkpoint is None or checkpoint.parent == run.checkpoints):
            run._continue(step, checkpoint)
            return run
        if overwrite:
            run._clear()
        elif run.holds_results():
            raise ConfigError(
                f"{run.path} already holds a run ({run.outcome()}); continue it (--resume auto; in Python resume=True), "
                "replace it (--overwrite; overwrite=True), or choose another output_dir"
            )
        else:
            run._clear_trail()
        if checkpoint is not None:  # weights and optimiser of another run: its trail stays there
            run.resumed_from = checkpoint_step(checkpoint)
        return run

    def holds_results(self) -> bool:
        """True when replacing this directory would lose something: a metrics line, an evolution, a checkpoint or a model."""
        return (
            self.model.exists()
            or self.evolution.exists()
            or self.metrics.size() > 0
            or any(self.checkpoints.glob("checkpoint-*"))
        )

    def write_text(self, name: str, text: str) -> Path:
        """Write the file `name` atomically and return its path. Raises `ConfigError` when the disk refuses."""
        path = self.path / name
        with disk_errors(path):
            write_atomic(path, text)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write `value` as indented JSON, atomically."""
        return self.write_text(name, dumps(value, indent=2) + "\n")

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A folder to write `name` into; it takes that name only when the block ends without an error.

        An older folder of that name is replaced, and kept when the block fails.
        """
        final, partial, old = self.path / name, self.path / f".{name}.partial", self.path / f".{name}.old"
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        with disk_errors(final):
            partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    # --- sessions -----------------------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[RunDirectory]:
        """Record in `status.json` that a session runs, and how it ended. Errors pass through."""
        self._lock()
        history = [
            {**session, "outcome": "killed" if session.get("outcome") == "running" else session.get("outcome")}
            for session in (self.read_status().get("sessions", []) if self.resumed_from else [])
        ]
        now = {"started": _now(), "from_step": self.resumed_from, "host": platform.node(), "pid": os.getpid()}
        try:
            self._write_status("running", history, now)
            yield self
        except (KeyboardInterrupt, SystemExit):
            self._write_status("interrupted", history, now)
            raise
        except BaseException as error:
            self._write_status("failed", history, now, error)
            raise
        else:
            self._write_status("finished", history, now)
        finally:
            for trail in (self.metrics, self.samples, self.sections):
                trail.close()
            self._unlock()

    def read_status(self) -> dict[str, Any]:
        """`status.json` as it stands; empty when there is none or it is damaged."""
        try:
            status = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def outcome(self) -> str:
        """`finished`, `failed`, `interrupted`, `running`, `killed` (it says running, but nobody is), or `unknown`."""
        status = str(self.read_status().get("status", "unknown"))
        return "killed" if status == "running" and not self.is_running() else status

    def is_running(self) -> bool:
        """True while a live process, this one or another on this machine, holds a session of this run."""
        if self.path in _held:
            return True
        lock = self.path / ".lock"
        if fcntl is None or not lock.exists():
            return False
        with lock.open("ab") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:  # a file system without locks
                return False
        return False

    # --- checkpoints --------------------------------------------------------------------------------------------

    def mark_checkpoint(self, checkpoint: str | Path, step: int) -> None:
        """Say that a checkpoint is whole, and how long each trail file was when it was saved."""
        trail = {name: JsonLines(self.path / name).size() for name in TRAIL}
        with disk_errors(Path(checkpoint)):
            write_atomic(Path(checkpoint) / MARK, dumps({"step": step, "trail": trail}) + "\n")

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint: a marked one, else (killed before the mark) one whose state file is whole."""
        folders = [folder for folder in self.checkpoints.glob("checkpoint-*") if folder.name.split("-")[-1].isdigit()]
        folders.sort(key=lambda folder: int(folder.name.split("-")[-1]), reverse=True)
        for name in (MARK, "trainer_state.json"):
            for folder in folders:
                if _read_json(folder / name) is not None:
                    return folder
        return None

    # --- inside -------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()

    def _continue(self, step: int, checkpoint: Path | None) -> None:
        self.resumed_from = step
        if step <= 0:
            self._clear_trail()
            return
        sizes = (_read_json(checkpoint / MARK) or {}).get("trail", {}) if checkpoint else {}
        for trail in (self.metrics, self.samples, self.sections):
            size = sizes.get(trail.path.name)
            if size is None or size > trail.size():
                trail.truncate_after(step)
            else:
                trail.truncate_bytes(size)
        for mark in self.checkpoints.glob(f"checkpoint-*/{MARK}"):  # later checkpoints are of the abandoned future
            if checkpoint_step(mark.parent) > step:
                mark.unlink()

    def _clear_trail(self) -> None:
        for trail in (self.metrics, self.samples, self.sections):
            trail.close()
            trail.path.unlink(missing_ok=True)

    def _clear(self) -> None:
        with disk_errors(self.path):
            for path in (self.path / name for name in OWNED):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _lock(self) -> None:
        if self.path in _held:
            raise ConfigError(f"{self.path} already has a running session in this process; close it first")
        file = (self.path / ".lock").open("ab")
        _held[self.path] = file
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._unlock()
                raise ConfigError(f"{self.path} is being written by another run; choose another output_dir") from error
            except OSError:  # a file system without locks: go on without one
                return

    def _unlock(self) -> None:
        _held.pop(self.path).close()

    def _write_status(
        self, outcome: str, history: list[Any], session: dict[str, Any], error: BaseException | None = None
    ) -> None:
        ended = None if outcome == "running" else _now()
        status: dict[str, Any] = {
            "status": outcome,
            "sessions": [*history, {**session, "ended": ended, "outcome": outcome}],
        }
        if error is not None:
            status["error"] = {"type": type(error).__name__, "message": str(error)}
            if not isinstance(error, AlignTuneError):
                status["error"]["traceback"] = "".join(traceback.format_exception(error))
        with disk_errors(self.status):
            write_atomic(self.status, dumps(status, indent=2) + "\n")


def checkpoint_step(checkpoint: Path) -> int:
    """The step of a checkpoint folder, from its mark, its `trainer_state.json` or its name.

    Raises `ConfigError` when the folder is missing or none of the three tells.
    """
    latest = RunDirectory(checkpoint).latest_checkpoint()
    if not checkpoint.is_dir() or latest is not None:
        example = latest or "output/checkpoints/checkpoint-100"
        raise ConfigError(f"{checkpoint} is not a checkpoint folder; give a folder such as {example}")
    for name, key in ((MARK, "step"), ("trainer_state.json", "global_step")):
        content = _read_json(checkpoint / name)
        if content is not None and isinstance(content.get(key), int):
            return content[key]
    named = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if named is None:
        raise ConfigError(f"{checkpoint} holds no trainer_state.json, so it is not a checkpoint to resume from")
    return int(named[1])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
