"""Which documents share a row? Packing of tokenised rows into rows of at most `max_length` tokens.

`bfd` (best-fit decreasing, arXiv 2404.10830): longest document first, each into the fullest row that still has room. No document
is split; one longer than `max_length` is cut. Rows carry `position_ids` that restart at each document, by which attention
stays within documents, and no document's first token is a target. At most 11/9 of the fewest possible rows, plus 6/9.

`wrapped`: all documents after one another, cut every `max_length` tokens. Rows are full but for the last; documents are
split, and attention crosses them (no `position_ids`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value

from aligntune.data.cache import cached_map
from aligntune.data.fingerprint import rows_fingerprint
from aligntune.data.masks import IGNORED, Ids
from aligntune.data.sources import column_names, processes
from aligntune.errors import ConfigError

logger = logging.getLogger(__name__)

Lengths = npt.NDArray[np.int64]
WINDOW = 1000
"""Documents of a stream that are packed together."""


def best_fit_decreasing(lengths: Sequence[int] | Lengths, capacity: int) -> list[list[int]]:
    """Bins of document indices; the lengths of a bin add up to at most `capacity`. Longer documents count as `capacity`.

    Some bin has s tokens of room where s is in `spaces`, so the tightest fit is its lowest number from the document's length
    up: O(n log n) for sorting, and n operations that hardly depend on `capacity`.
    """
    sizes = np.minimum(np.asarray(lengths, dtype=np.int64), capacity)
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    spaces = _Numbers(capacity)
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        space = spaces.at_least(size)
        if space is not None:
            target = with_room[space].pop()
            if not with_room[space]:
                spaces.remove(space)
            bins[target].append(document)
        else:
            space, target = capacity, len(bins)
            bins.append([document])
        if space > size:
            with_room.setdefault(space - size, []).append(target)
            spaces.add(space - size)
    return bins


BITS = 10


class _Numbers:
    """A set of numbers from 0 to `most`: one bit each in blocks of 1024, and a bit for each block that is not empty."""

    def __init__(self, most: int) -> None:
        self.blocks, self.used = [0] * ((most >> BITS) + 1), 0

    def add(self, number: int) -> None:
        block, place = divmod(number, 1 << BITS)
        self.blocks[block] |= 1 << place
        self.used |= 1 << block

    def remove(self, number: int) -> None:
        block, place = divmod(number, 1 << BITS)
        self.blocks[block] &= ~(1 << place)
        if not self.blocks[block]:
            self.used &= ~(1 << block)

    def at_least(self, number: int) -> int | None:
        """The lowest of the set that is not below `number`."""
        block, place = divmod(number, 1 << BITS)
        if above := self.blocks[block] >> place:
            return number + _lowest(above)
        later = self.used >> block + 1
        if not later:
            return None
        block += 1 + _lowest(later)
        return (block << BITS) + _lowest(self.blocks[block])


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def pack(
    rows: Dataset | IterableDataset, max_length: int, strategy: str = "bfd", *, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Packed rows with `input_ids`, `labels`, `length`, and for `bfd` `position_ids`. Other columns are left behind.

    A stream is packed in windows of 1000 documents.

    Raises:
        ConfigError: an unknown strategy.
    """
    if strategy not in ("bfd", "wrapped"):
        raise ConfigError(f"packing_strategy {strategy!r} should be bfd or wrapped")
    if isinstance(rows, IterableDataset):
        window = partial(_pack_window, max_length=max_length, strategy=strategy)
        return rows.map(window, batched=True, batch_size=WINDOW, remove_columns=column_names(rows))
    lengths = np.asarray(rows.with_format("numpy")["length"][:], dtype=np.int64)
    key = {
        "what": "pack",
        "rows": rows_fingerprint(rows.select_columns(["input_ids", "labels"])),
        "max_length": max_length,
    }
    ids = List(Value("int32"))
    features = {"input_ids": ids, "labels": ids, "length": Value("int32")}
    if strategy == "bfd":
        _tell(lengths, max_length)
        plan = Dataset.from_dict({"documents": best_fit_decreasing(lengths, max_length)})
        function: Any = PackBins(rows, max_length)
        features["position_ids"] = ids
    else:
        plan = Dataset.from_dict({"start": np.arange(0, lengths.sum(), max_length)})
        function = WrapRows(rows, np.cumsum(lengths), max_length)
    return cached_map(
        plan, function, key=key, features=Features(features), num_proc=processes(num_proc), desc="pack", batch_size=200
    )


def _tell(lengths: Lengths, max_length: int) -> None:
    over = lengths > max_length
    if over.any():
        lost = int((lengths[over] - max_length).sum())
        logger.warning(
            "packing cuts %d of %d documents to %d tokens: %d tokens lost", over.sum(), len(lengths), max_length, lost
        )


@dataclass(frozen=True, slots=True)
class Documents:
    """Several documents after one another: `ids` and `labels` [sum of lengths], `lengths` [n]."""

    ids: Ids
    labels: Ids
    lengths: Lengths

    @classmethod
    def of_table(cls, table: pa.Table) -> Documents:
        columns = [table[name].combine_chunks() for name in ("input_ids", "labels")]
        ids, labels = (column.flatten().to_numpy() for column in columns)
        return cls(ids, labels, columns[0].value_lengths().to_numpy().astype(np.int64))

    @classmethod
    def of_lists(cls, ids: Sequence[Any], labels: Sequence[Any]) -> Documents:
        lengths = np.asarray([len(row) for row in ids], dtype=np.int64)
        flat = [np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) for rows in (ids, labels)]
        return cls(flat[0], flat[1], lengths)


def pack_bins(documents: Documents, bins: Sequence[Any], max_length: int) -> dict[str, list[Any]]:
    """One row for each bin of `documents`, documents in the order of the bin."""
    order = np.concatenate([np.asarray(bin, dtype=np.int64) for bin in bins])
    starts = np.concatenate([[0], np.cumsum(documents.lengths)[:-1]])[order]
    lengths = np.minimum(documents.lengths[order], max_length)
    begins = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) - np.repeat(begins, lengths)
    source = np.repeat(starts, lengths) + positions
    labels = documents.labels[source]
    labels[begins] = IGNORED
    documents_before = np.cumsum([len(bin) for bin in bins])[:-1]
    cuts = begins[documents_before]
    ids = np.split(documents.ids[source], cuts)
    return {
        "input_ids": ids,
        "labels": np.split(labels, cuts),
        "length": [len(row) for row in ids],
        "position_ids": np.split(positions.astype(np.int32), cuts),
    }


def wrap(documents: Documents, max_length: int) -> dict[str, list[Any]]:
    """All documents after one another, cut every `max_length` tokens."""
    cuts = np.arange(max_length, len(documents.ids), max_length)
    labels = documents.labels.copy()
    labels[np.cumsum(documents.lengths) - documents.lengths] = IGNORED  # as everywhere: no document's first token
    labels[::max_length] = IGNORED
    ids = np.split(documents.ids, cuts)
    return {"input_ids": ids, "labels": np.split(labels, cuts), "length": [len(row) for row in ids]}


@dataclass
class PackBins:
    """The function that `datasets.map` runs over bins: it fetches their documents from `rows`."""

    rows: Dataset
    max_length: int

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        bins = batch["documents"]
        wanted, places = np.unique(np.concatenate([np.asarray(bin) for bin in bins]), return_inverse=True)
        table = self.rows.select_columns(["input_ids", "labels"]).with_format("arrow")[wanted.tolist()]
        local = np.split(places, np.cumsum([len(bin) for bin in bins])[:-1])
        return pack_bins(Documents.of_table(table), local, self.max_length)


@dataclass
class WrapRows:
    """The function that `datasets.map` runs over the starts of wrapped rows; `ends` [n] are the documents' ends."""

    rows: Dataset
    ends: Lengths
    max_length: int

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        start, stop = batch["start"][0], min(batch["start"][-1] + self.max_length, int(self.ends[-1]))
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        table = self.rows.select_columns(["input_ids", "labels"]).with_format("arrow")[first : last + 1]
        documents = Documents.of_table(table)
        skip = start - (int(self.ends[first]) - int(documents.lengths[0]))
        labels = documents.labels.copy()
        labels[np.cumsum(documents.lengths) - documents.lengths] = IGNORED
        window = slice(skip, skip + stop - start)
        cut = Documents(documents.ids[window], labels[window], np.asarray([stop - start]))
        return wrap(cut, self.max_length)


def _pack_window(batch: Mapping[str, list[Any]], *, max_length: int, strategy: str) -> dict[str, list[Any]]:
    documents = Documents.of_lists(batch["input_ids"], batch["labels"])
    if strategy == "wrapped":
        return wrap(documents, max_length)
    return pack_bins(documents, best_fit_decreasing(documents.lengths, max_length), max_length)
