"""Has this been tokenised before? A `map` whose result is kept under a key made of all that decides it.

The key is a fingerprint of the rows' content, the tokenizer, the settings and the versions of the libraries involved, so the
same data from another path is found too, and any change of content is not. Results lie in `$ALIGNTUNE_CACHE`, or in
`aligntune` beside the cache of `datasets`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from datasets import Dataset, Features

from aligntune.data.fingerprint import fingerprint, rows_fingerprint

FORMAT = 3
"""Raise when the same rows and settings give other tokens, or another error, than before."""


def cache_folder() -> Path:
    """Where tokenised rows are kept."""
    return Path(os.environ.get("ALIGNTUNE_CACHE") or Path(datasets.config.HF_DATASETS_CACHE) / "aligntune").expanduser()


def cached_map(
    rows: Dataset,
    function: Callable[..., Mapping[str, Any]],
    *,
    key: Mapping[str, Any],
    features: Features,
    num_proc: int | None,
    desc: str,
    batch_size: int = 1000,
) -> Dataset:
    """`function(batch, indices)` over all rows, new columns only; read from the cache where it has been done before.

    `key` holds what decides the result beside the rows. With caching switched off in `datasets`, nothing is kept.
    """
    options: dict[str, Any] = {}
    if datasets.is_caching_enabled():
        versions = [FORMAT, tokenizers.__version__, transformers.__version__]
        name = fingerprint([rows_fingerprint(rows), dict(key), features.to_dict(), versions])
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        options = {"cache_file_name": str(folder / f"{name}.arrow"), "new_fingerprint": name}
    return rows.map(
        function,
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        num_proc=num_proc,
        desc=desc,
        **options,
    )
