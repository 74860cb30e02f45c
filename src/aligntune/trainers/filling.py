"""What do several processes do when the rows do not fill their last batch? The missing rows do not count.

Every process must do the same number of batches. accelerate repeats the first rows to get there, which would be trained on twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.utils.data import Sampler

from aligntune.data.masks import IGNORED

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

NO_ROW = -1
"""The `row` of a row that only fills up a batch."""
FILLS = "fills"
"""Column that is true where a pair only fills up a batch."""


class FillsLastBatch(_Base):
    """Mixin: the training rows, in the order that one process would have, then those that fill the last batch of all."""

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, is_training: bool = False, **more: Any
    ) -> Any:  # fmt: skip
        world, make = self.args.world_size, super()._get_dataloader
        if not is_training or world == 1 or self.args.dataloader_drop_last:
            return make(dataset, description, batch_size, sampler_fn, is_training, **more)
        rows = filled(dataset, batch_size * world)
        ordered = None if sampler_fn is None else (lambda _: sampler_fn(dataset))
        loader = make(rows, description, batch_size, ordered, is_training, **more)
        if rows is not dataset and isinstance(rows, Dataset):
            batches = loader.batch_sampler.batch_sampler  # of all processes
            batches.sampler = _ThenFillers(batches.sampler, len(rows))
        return loader


class _ThenFillers(Sampler[int]):
    """The places of `sampler`, then those from there to `end`."""

    def __init__(self, sampler: Any, end: int) -> None:
        self.sampler, self.end = sampler, end

    def __len__(self) -> int:
        return self.end

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(len(self.sampler), self.end)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


def filled(rows: Any, size: int) -> Any:
    """`rows` filled up to whole batches of `size` (over all processes) with rows that carry no labels, and `NO_ROW` where
    rows have a `row`; pairs, which have no labels, with pairs that are marked."""
    if isinstance(rows, IterableDataset):
        return _FilledStream(rows, size)
    if not isinstance(rows, Dataset) or not -len(rows) % size:
        return rows
    fillers = rows.select([0] * (-len(rows) % size))
    if "labels" not in rows.column_names:
        marks = [False] * len(rows) + [True] * len(fillers)
        return concatenate_datasets([rows, fillers]).add_column(FILLS, marks)
    return concatenate_datasets([rows, fillers.map(_without_labels, features=rows.features)])


class _FilledStream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, rows: IterableDataset, size: int) -> None:
        self.rows, self.size = rows, size

    def __iter__(self) -> Iterator[Any]:
        place = -1
        for place, row in enumerate(self.rows):  # noqa: B007  (read behind the loop)
            yield row
        for _ in range(-(place + 1) % self.size):
            yield row | _without_labels(row)

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": np.full(np.shape(row["labels"]), IGNORED)[()]} | ({"row": NO_ROW} if "row" in row else {})
