"""In which order are several datasets read? By weight, as a pure function of the seed and the sizes.

With weights, the share of dataset i in every stretch of the order is w_i / sum(w), to within a row or two; the
epoch is as short as it can be with every row in it at least once, so the datasets that would run out earlier
start over in a new order. Without weights every row comes once, and each dataset's rows are spread evenly. Nothing is
drawn while training, so a run continues at any position by its number alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets

from aligntune.errors import ConfigError, DataError


def mix_order(
    sizes: Sequence[int], weights: Sequence[float] | None, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(dataset [n], row [n]): at each position of the epoch, which row of which dataset."""
    counts = np.asarray(sizes, dtype=np.int64)
    if weights is not None:
        shares = np.asarray(weights, dtype=np.float64)
        if len(shares) != len(sizes) or not (shares > 0).all():
            raise ConfigError(f"each of the {len(sizes)} datasets needs a weight above 0, got {list(weights)}")
        shares = shares / shares.sum()
        counts = np.maximum(counts, np.rint((counts / shares).max() * shares).astype(np.int64))
    rows, sources, keys = [], [], []
    for source, (size, count) in enumerate(zip(sizes, counts.tolist(), strict=True)):
        draw = np.random.default_rng([seed, source])
        passes = [draw.permutation(size) for _ in range(-(-count // size))]
        rows.append(np.concatenate(passes)[:count])
        sources.append(np.full(count, source, dtype=np.int64))
        keys.append((np.arange(count) + draw.random(count)) / count)  # one row in each of `count` equal stretches
    order = np.argsort(np.concatenate(keys), kind="stable")
    return np.concatenate(sources)[order], np.concatenate(rows)[order]


def mix(
    parts: Sequence[Dataset] | Sequence[IterableDataset], weights: Sequence[float] | None, *, seed: int
) -> Dataset | IterableDataset:
    """One dataset of all parts in mixed order; columns that not all have are left out.

    `weights` None: every row once. Streams, whose sizes are not known, are drawn at random by weight (equal when None), and go
    on until the longest has ended.

    Raises:
        ConfigError: weights that are not one positive number a dataset, or streams mixed with datasets in memory.
        DataError: a column of all that does not hold the same kind of value in each.
    """
    streams = [isinstance(part, IterableDataset) for part in parts]
    if any(streams) and not all(streams):
        raise ConfigError("either all datasets of a mixture are streamed, or none")
    if len(parts) == 1:
        return parts[0]
    shared = [name for name in parts[0].column_names or [] if all(name in (part.column_names or []) for part in parts)]
    parts = [part.select_columns(shared) for part in parts] if shared else parts
    try:
        if all(streams):
            shares = np.asarray(weights if weights is not None else [1.0] * len(parts))
            chances = (shares / shares.sum()).tolist()
            return datasets.interleave_datasets(list(parts), chances, seed, stopping_strategy="all_exhausted")
        whole = concatenate_datasets(list(parts))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"the datasets have columns that cannot be mixed: {_of_two_kinds(parts) or error}. Convert them with processing_fn, "
            "or name the columns that are needed in preserve_columns"
        ) from error
    sizes = [len(part) for part in parts]  # type: ignore[arg-type]
    sources, rows = mix_order(sizes, weights, seed)
    offsets = np.cumsum([0, *sizes[:-1]])
    return whole.select(offsets[sources] + rows)


def _of_two_kinds(parts: Sequence[Dataset] | Sequence[IterableDataset]) -> str:
    """The columns that hold other kinds of values in one part than in another, where the parts know theirs."""
    kinds: dict[str, list[str]] = {}
    for part in parts:
        for name, kind in (part.features or {}).items():
            kinds.setdefault(name, []).append(str(kind))
    return "; ".join(
        f"{name!r} is {' and '.join(dict.fromkeys(found))}" for name, found in kinds.items() if len(set(found)) > 1
    )
