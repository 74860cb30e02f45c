"""Rows that a generator of tasks makes: `reasoning_gym:TASK`, with `?name=value&...` for the task's own settings.

    dataset: {name: "reasoning_gym:chain_sum?min_terms=2&max_terms=3", max_samples: 2000}

Rows have the columns `prompt`, `answer` and `entry` (the generator's item as JSON), which its scorer, the reward
`reasoning_gym`, reads. They depend on the task, its settings, the split and the seed alone.
"""

from __future__ import annotations

import difflib
import json
import zlib
from typing import Any
from urllib.parse import parse_qsl

import yaml
from datasets import Dataset

from aligntune.data.sources import row_source
from aligntune.errors import ConfigError, DataError, require

SIZE = 500
"""Rows while `max_samples` is unset."""


@row_source("reasoning_gym")
def reasoning_gym(rest: str, *, split: str = "train", max_samples: int | None = None, seed: int = 0) -> Dataset:
    """`max_samples` (else 500) items of a task of reasoning-gym (arXiv 2505.24760); other splits are other items.

    Raises:
        MissingExtra: reasoning-gym is not installed.
        DataError: there is no such task.
        ConfigError: the task has no such setting, or refuses its value.
    """
    module = require("reasoning_gym", extra="rewards", why=f"the dataset reasoning_gym:{rest}")
    task, _, query = rest.partition("?")
    settings = {name: yaml.safe_load(value) for name, value in parse_qsl(query, strict_parsing=bool(query))}
    known = module.factory.DATASETS
    if task not in known:
        close = difflib.get_close_matches(task, known, n=3)
        raise DataError(
            f"reasoning_gym has no task {task!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    first = seed if split == "train" else zlib.crc32(f"{split} {seed}".encode()) % 2**31
    try:
        items = module.create_dataset(task, size=max_samples or SIZE, seed=first, **settings)
        return Dataset.from_list([_row(item) for item in items])
    except (TypeError, AssertionError, ValueError) as error:  # unknown settings, and values that the task refuses
        raise ConfigError(f"dataset.name: reasoning_gym:{rest}: {error}") from error


def _row(item: dict[str, Any]) -> dict[str, str]:
    return {"prompt": item["question"], "answer": str(item["answer"]), "entry": json.dumps(item, default=str)}
