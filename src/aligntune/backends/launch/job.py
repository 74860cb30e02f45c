"""What does a process that this one starts get told, and what does it tell back? Files in one folder."""

from __future__ import annotations

import json
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune import errors
from aligntune.config.dump import plain_tree
from aligntune.config.resolve import Resolved
from aligntune.errors import AlignTuneError, BackendError, ConfigError

FILE = "job.json"


class Unavailable(BackendError):
    """The backend that the process was started for does not run on this machine; another may take its place."""


@dataclass(frozen=True)
class Job:
    """One session of a run in other processes; `folder` holds `job.json`, then `rank-*.json` and `result.json`."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def write(self, resolved: Resolved, backend: str, reasons: list[str], arguments: dict[str, Any]) -> None:
        """Tell what to run; forgets what an earlier session told back. `arguments` are those of `Session.train`."""
        tree, lost = plain_tree(resolved)
        if lost:
            raise ConfigError(
                "the run takes place in another process, which cannot import "
                + "; ".join(lost)
                + ": move it to a module (or give 'file.py:function')"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        told = {"config": tree, "backend": backend, "reasons": reasons, "arguments": arguments}
        self.file.write_text(json.dumps(told, indent=1), encoding="utf-8")

    def read(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return told

    def write_result(self, result: dict[str, Any]) -> None:
        (self.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")

    def result(self) -> dict[str, Any]:
        """What the main process reported at its end. Raises `BackendError` when it ended without."""
        path = self.folder / "result.json"
        if not path.exists():
            raise BackendError("the run's process ended without a result or an error; see its output above")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def write_error(self, rank: int, error: BaseException) -> None:
        """Tell the starter what stopped this process."""
        fields = {
            "rank": rank, "time": time.time(), "type": type(error).__name__, "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }  # fmt: skip
        (self.folder / f"rank-{rank}.json").write_text(json.dumps(fields), encoding="utf-8")

    def first_error(self) -> BaseException | None:
        """The error that came first, as the class it was where users can act on it; None when no process told of one."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("rank-*.json")]
        if not found:
            return None
        first = min(found, key=lambda fields: fields["time"])
        return _error(first)


def _error(fields: dict[str, Any]) -> BaseException:
    if fields["type"] == "KeyboardInterrupt":
        return KeyboardInterrupt()
    if fields["type"] == Unavailable.__name__:
        return Unavailable(fields["message"])
    known = getattr(errors, fields["type"], None)
    if isinstance(known, type) and issubclass(known, AlignTuneError):
        return known(fields["message"])
    return BackendError(
        f"rank {fields['rank']} failed with {fields['type']}: {fields['message']}\n{fields['traceback']}"
    )
