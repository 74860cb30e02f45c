"""Which rows does this dataset config name? Local files, folders, saved datasets, hub names, and registered schemes.

Order of steps: load the split; draw the share and the cap (`percent`, then `max_samples`) under the seed; rename columns;
apply `processing_fn`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from aligntune.config import rl, sft
from aligntune.data.files import LOADERS, close_paths, ending, load_path
from aligntune.data.functions import find_function
from aligntune.errors import ConfigError, DataError

Rows = TypeVar("Rows", Dataset, IterableDataset)
DatasetConfig = sft.DatasetConfig | rl.DatasetConfig


def called(config: DatasetConfig) -> str:
    """What messages call a dataset: its name, and its split unless that is the usual one."""
    return config.name if config.split == "train" else f"{config.name} (split {config.split})"


SCHEMES: dict[str, Callable[..., Dataset]] = {}
"""Scheme of a name like `scheme:rest` -> function(rest, split=, max_samples=, seed=) that makes the rows."""


def row_source(scheme: str) -> Callable[[Callable[..., Dataset]], Callable[..., Dataset]]:
    """Register what makes the rows of datasets named `scheme:...`."""

    def register(make: Callable[..., Dataset]) -> Callable[..., Dataset]:
        SCHEMES[scheme] = make
        return make

    return register


def load_rows(
    config: DatasetConfig,
    *,
    seed: int,
    split: str | None = None,
    streaming: bool | None = None,
    load_kwargs: Mapping[str, Any] | None = None,
) -> Dataset | IterableDataset:
    """The rows of `config`, drawn, renamed and processed, before any format is looked for.

    Args:
        seed: decides which rows `percent` and `max_samples` draw; the drawn rows keep their order.
        split: another split than the config's (for evaluation).
        streaming: read lazily; unset, the config says.
        load_kwargs: further arguments of `datasets.load_dataset` (SFT's `dataset_kwargs`).

    Raises:
        DataError: missing file or dataset, no rows, unknown split, a column that is not there.
        ConfigError: a `processing_fn` that is not there, `percent` of a stream, or `load_kwargs` that cannot act.
    """
    options = _load_options(load_kwargs)
    if streaming is None:
        streaming = isinstance(config, sft.DatasetConfig) and config.streaming
    split = split or config.split
    scheme, _, rest = config.name.partition(":")
    if rest and scheme in SCHEMES:
        if options:
            raise ConfigError(f"dataset_kwargs: {config.name} is made, not loaded; {', '.join(options)} has no effect")
        made = SCHEMES[scheme](rest, split=split, max_samples=config.max_samples, seed=seed)
        made = draw(made, percent=config.percent, max_samples=None, seed=seed)
        return _process(_rename(made, config), config)
    loaded = _load(config, split, streaming, options)
    if isinstance(loaded, IterableDataset):
        if next(iter(loaded), None) is None:
            raise DataError(f"{config.name} (split {split}) has no rows")
        return _process(_rename(_head(loaded, config), config), config)
    if len(loaded) == 0:
        raise DataError(f"{config.name} (split {split}) has no rows")
    drawn = draw(loaded, percent=config.percent, max_samples=config.max_samples, seed=seed)
    processed = _process(_rename(drawn, config), config)
    if len(processed) == 0:
        raise DataError(f"processing_fn left no rows of {config.name}")
    return processed


def draw(rows: Dataset, *, percent: float | None, max_samples: int | None, seed: int) -> Dataset:
    """A random subset under the seed, in the rows' own order: `percent` of them, then at most `max_samples`.

    The same seed with a larger share or cap gives a superset.
    """
    count = len(rows)
    if percent is not None:
        count = max(1, round(count * percent / 100))
    if max_samples is not None:
        count = min(count, max_samples)
    if count == len(rows):
        return rows
    places = np.random.default_rng(seed).permutation(len(rows))[:count]
    return rows.select(np.sort(places))


OWN_NAMES = {
    "path": "name",
    "name": "subset",
    "split": "split",
    "streaming": "streaming",
    "num_proc": "dataset_num_proc",
}
"""Arguments of `datasets.load_dataset` that have a setting of their own in the dataset section."""


def _load_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    for name in given or ():
        if name in OWN_NAMES:
            raise ConfigError(f"dataset_kwargs.{name}: has a setting of its own, dataset.{OWN_NAMES[name]}; use that")
    return dict(given or {})


def _load(config: DatasetConfig, split: str, streaming: bool, options: dict[str, Any]) -> Dataset | IterableDataset:
    path = Path(config.name).expanduser()
    looks_local = path.is_absolute() or config.name.startswith((".", "~")) or ending(path) in LOADERS
    if path.exists() or looks_local:
        return load_path(path, split, streaming=streaming, options=options)
    subset = config.subset if isinstance(config, sft.DatasetConfig) else config.config_name
    try:
        return datasets.load_dataset(config.name, subset, split=split, streaming=streaming, **options)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"{config.name!r} is neither a local file or folder nor a dataset on the hub that can be reached "
            f"({error}).{close_paths(path)}"
        ) from error
    except ValueError as error:  # unknown configuration or split; datasets' message lists the known ones
        raise DataError(f"{config.name}: {error}") from error


def _head(rows: IterableDataset, config: DatasetConfig) -> IterableDataset:
    if config.percent is not None:
        raise ConfigError("percent needs the number of rows, which a stream does not tell; use max_samples")
    return rows if config.max_samples is None else rows.take(config.max_samples)


def _mapping(config: DatasetConfig) -> dict[str, str]:
    return (
        config.column_mapping
        if isinstance(config, sft.DatasetConfig)
        else config.field_mappings or config.column_mapping
    )


def _rename(rows: Rows, config: DatasetConfig) -> Rows:
    mapping = _mapping(config)
    if not mapping:
        return rows
    columns = column_names(rows)
    if not any(source in columns for source in mapping) and all(target in columns for target in mapping.values()):
        mapping = {target: source for source, target in mapping.items()}
    absent = [source for source in mapping if source not in columns]
    if absent:
        raise DataError(
            f"column_mapping names {', '.join(map(repr, absent))}, but the columns of {config.name} are: {', '.join(columns)}"
        )
    kept = [column for column in columns if column not in mapping]
    targets = list(mapping.values())
    clash = [target for target in targets if target in kept or targets.count(target) > 1]
    if clash:
        raise DataError(
            f"column_mapping would give two columns the name {clash[0]!r}; the columns are: {', '.join(columns)}"
        )
    return rows.rename_columns({source: target for source, target in mapping.items() if source != target})


def _process(rows: Rows, config: DatasetConfig) -> Rows:
    if config.processing_fn is None:
        return rows
    function = find_function(config.processing_fn, "processing_fn")
    options: dict[str, Any] = {"batched": config.processing_batched, "fn_kwargs": dict(config.processing_fn_kwargs)}
    if config.processing_batched:  # a batch may come back with another number of rows
        options["remove_columns"] = column_names(rows)
    if isinstance(rows, Dataset):  # not from the cache of `datasets`, which does not see what the function calls
        options |= {
            "num_proc": processes(config.dataset_num_proc),
            "desc": "processing_fn",
            "load_from_cache_file": False,
        }
    return rows.map(_checked(function), **options)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(row: Mapping[str, Any], **kwargs: Any) -> Mapping[str, Any]:
        result = function(dict(row), **kwargs)
        if not isinstance(result, Mapping):
            raise ConfigError(f"processing_fn should return a dict, got {type(result).__name__}")
        return result

    return call


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """The columns; of a stream that does not know them, those of its first row."""
    return list(rows.column_names or next(iter(rows), {}))


def list_lengths(rows: Dataset, column: str) -> npt.NDArray[np.int64]:
    """[n] how many entries each row's list in `column` has."""
    batches = rows.select_columns([column]).with_format("arrow").iter(10_000)
    counts = [pc.list_value_length(batch[column]).to_numpy() for batch in batches]
    return np.concatenate([np.zeros(0, np.int64), *counts])


def processes(count: int | None) -> int | None:
    """`num_proc` for `datasets`: one process means none beside this one."""
    return count if count is not None and count > 1 else None
