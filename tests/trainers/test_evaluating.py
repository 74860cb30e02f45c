"""Evaluation rows fill whole batches of all processes, and what fills them up counts nowhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from aligntune.data.masks import IGNORED
from aligntune.trainers.filling import NO_ROW, filled
from aligntune.trainers.label_evaluation import Scorer

TEXTS = {"labels": [0, 1, 1], "row": [0, 1, 2]}
TOKENS = {"labels": [[IGNORED, 1], [0, 2, 1], [1]]}


@pytest.mark.parametrize("columns", [TEXTS, TOKENS], ids=["one label a row", "one a token"])
@pytest.mark.parametrize("streams", [False, True])
def test_fillers_carry_no_label(columns: dict[str, Any], streams: bool) -> None:
    rows = Dataset.from_dict(columns)
    found = list(filled(rows.to_iterable_dataset() if streams else rows, 4))
    assert found[:3] == list(rows)
    (filler,) = found[3:]
    assert (np.asarray(filler["labels"]) == IGNORED).all()
    assert np.shape(filler["labels"]) in [np.shape(row["labels"]) for row in rows]
    assert filler.get("row", NO_ROW) == NO_ROW


def test_whole_batches_are_left_as_they_are() -> None:
    rows = Dataset.from_dict(TEXTS)
    assert filled(rows, 3) is rows
    assert len(list(filled(rows.to_iterable_dataset(), 3))) == 3


@pytest.mark.parametrize("tags", [False, True])
def test_a_scorer_leaves_fillers_out(tags: bool) -> None:
    """In whatever order the processes' rows come: predictions stand beside the columns of their own rows."""
    rows = np.array([1, NO_ROW, 0, NO_ROW])
    classes = np.array([1, 0, 0, 0])
    labels = np.array([1, IGNORED, 0, IGNORED])
    scorer = Scorer(["O", "B-X"], tags)
    guesses: Any = (classes[:, None], np.ones((4, 1))) if tags else (classes, np.ones(4))
    found = scorer(EvalPrediction(guesses, (labels[:, None] if tags else labels, rows)))
    assert found["accuracy"] == 1
    assert scorer.last is not None
    assert list(scorer.last.references) == ([["O"], ["B-X"]] if tags else ["O", "B-X"])
