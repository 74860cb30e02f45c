"""How many rows does a dataset have? Told from a local file without loading it, else None."""

from __future__ import annotations

import csv
import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

LARGE = 2**28
"""Bytes of a JSON array that is still read to be counted."""


def count_rows(sources: list[Any]) -> int | None:
    """Rows of an epoch over all datasets, after `percent` and `max_samples`; None when one is unknown.

    With weights, datasets start over until their shares are right and every row has come (`data.mix.mix_order`).
    """
    counts = [_count(source) for source in sources]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    if len(known) == 1 or not any(source.is_set("weight") for source in sources):
        return sum(known)
    total = sum(source.weight for source in sources)
    shares = [source.weight / total for source in sources]
    whole = max(count / share for count, share in zip(known, shares, strict=True))
    return sum(max(count, round(whole * share)) for count, share in zip(known, shares, strict=True))


def _count(source: Any) -> int | None:
    rows = None if "[" in source.split else _of_path(Path(source.name).expanduser(), source.split)
    if rows is None:
        return None
    if source.percent is not None:
        rows = max(1, round(rows * source.percent / 100))
    return rows if source.max_samples is None else min(rows, source.max_samples)


def _of_path(path: Path, split: str) -> int | None:
    """A file, or a folder written by `datasets.save_to_disk`."""
    if path.is_file():
        return _of_file(path)
    state = next((file for file in (path / split / "state.json", path / "state.json") if file.exists()), None)
    if state is None:
        return None
    from pyarrow import ipc, memory_map

    files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    return sum(
        batch.num_rows for file in files for batch in ipc.open_stream(memory_map(str(state.parent / file["filename"])))
    )


def _of_file(path: Path) -> int | None:
    found = path.stat()
    return _in_file(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _in_file(path: Path, _changed: int, _size: int) -> int | None:
    """Read once, since advice plans a run under many settings."""
    name = path.name.lower()
    reader = gzip.open if name.endswith(".gz") else open
    kind = Path(name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        from pyarrow.parquet import ParquetFile

        return int(ParquetFile(path).metadata.num_rows)
    if kind in (".csv", ".tsv"):
        with reader(path, "rt", encoding="utf-8", newline="") as file:
            return max(0, sum(1 for row in csv.reader(file, delimiter="\t" if kind == ".tsv" else ",") if row) - 1)
    if kind in (".jsonl", ".ndjson"):
        with reader(path, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    if kind == ".json" and path.stat().st_size < LARGE:
        with reader(path, "rt", encoding="utf-8") as file:
            text = file.read()
        try:
            held = json.loads(text)
        except ValueError:  # JSON lines under another name
            return sum(1 for line in text.splitlines() if line.strip())
        return len(held) if isinstance(held, list) else None
    return None


def file_bytes(sources: list[Any]) -> int | None:
    """Bytes of the training files, None when one is not a local text file."""
    paths = [Path(source.name).expanduser() for source in sources]
    if not all(
        path.is_file() and path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") for path in paths
    ):
        return None
    return sum(path.stat().st_size for path in paths)
