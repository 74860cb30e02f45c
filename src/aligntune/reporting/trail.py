"""How does a run write lines that survive a kill? One JSON object a line, appended and flushed.

A line is on its way to the disk when `append` returns, so a killed process loses at most the line it was writing.
Readers skip such a torn last line; the next writer removes it.
"""

from __future__ import annotations

import enum
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from aligntune.errors import ConfigError


def clean(value: Any) -> Any:
    """`value` as plain JSON: numpy and torch scalars and arrays become numbers and lists, NaN and infinities null."""
    if value is None or (isinstance(value, (bool, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return clean(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return clean(value.tolist())
    return str(value)


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON (no NaN), non-ASCII kept readable."""
    return json.dumps(clean(value), ensure_ascii=False, allow_nan=False, indent=indent)


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file so that readers see the old content or the new, never a part of it.

    Raises `OSError` where the file system refuses; the old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn `OSError` inside the block into a `ConfigError` that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; "
            "choose an output_dir that you may write to and that has space"
        ) from error


class JsonLines:
    """A JSON-lines file that one process appends to and anyone reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one line and flush it to the operating system. Raises `ConfigError` on a full or refusing disk."""
        with disk_errors(self.path):
            if self._file is None:
                self._drop_torn_line()
                self._file = self.path.open("ab")
            self._file.write((dumps(row) + "\n").encode())
            self._file.flush()

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line, in order; no file is no rows. Raises `ValueError` naming a damaged line."""
        if not self.path.exists():
            return []
        found = []
        for index, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"{self.path}:{index} is not JSON ({error}); remove that line") from error
        return found

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate_bytes(self, size: int) -> None:
        """Keep the first `size` bytes."""
        self.close()
        if self.size() > size:
            os.truncate(self.path, size)

    def truncate_after(self, step: int) -> None:
        """Keep the rows up to and including `step`; rows without a step stay."""
        self.close()
        if self.path.exists():
            self.replace(row for row in self.rows() if row.get("step", 0) <= step)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rewrite the whole file atomically."""
        self.close()
        write_atomic(self.path, "".join(dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop_torn_line(self) -> None:
        if self.size():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)
