"""Which training rows fill the last batch of several processes, and when none do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from aligntune.trainers.filling import FILLS, FillsLastBatch, filled

ROWS = Dataset.from_dict({"input_ids": [[1, 2], [3], [4]], "labels": [[1, 2], [3], [4]]})


class Loads:
    """In the place of transformers' trainer: keeps what it is asked to load."""

    def __init__(self, **args: Any) -> None:
        self.args = SimpleNamespace(**{"world_size": 2, "dataloader_drop_last": False} | args)

    def _get_dataloader(self, dataset: Any, *_: Any, **__: Any) -> Any:
        self.loaded, sampler = dataset, SimpleNamespace(sampler=range(3))
        return SimpleNamespace(batch_sampler=SimpleNamespace(batch_sampler=sampler))


class Fills(FillsLastBatch, Loads):
    pass


@pytest.mark.parametrize(("settings", "training", "rows"), [
    ({}, True, 4), ({"dataloader_drop_last": True}, True, 3), ({"world_size": 1}, True, 3), ({}, False, 3),
])  # fmt: skip
def test_training_rows_are_filled_up_on_several_processes(settings: dict[str, Any], training: bool, rows: int) -> None:
    trainer = Fills(**settings)
    loader = trainer._get_dataloader(ROWS, "training", 2, None, training)
    assert len(trainer.loaded) == rows
    if rows == 4:
        assert list(loader.batch_sampler.batch_sampler.sampler) == [0, 1, 2, 3]
        assert trainer.loaded["labels"][3] == [-100, -100]


def test_pairs_that_fill_are_marked() -> None:
    pairs = Dataset.from_dict({"prompt_ids": [[1], [2], [3]]})
    assert filled(pairs, 4)[FILLS][:] == [False, False, False, True]
    assert filled(pairs, 3) is pairs
