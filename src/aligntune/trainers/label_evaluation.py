"""How does an evaluation of a classifier become metrics and sections of the report?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from aligntune.data.collate import PaddedCollator
from aligntune.data.masks import IGNORED
from aligntune.errors import ConfigError
from aligntune.evaluation.label_scores import LabelScores, score_tags, score_texts
from aligntune.evaluation.labels import Score
from aligntune.evaluation.registry import Metric
from aligntune.reporting import sections

Section = tuple[str, str, dict[str, Any]]
"""Kind, title, payload."""


class RowCollator:
    """Padded rows, and `row` [B] where the rows have it."""

    def __init__(self, collator: PaddedCollator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        if "row" in rows[0]:
            batch["row"] = torch.as_tensor([row["row"] for row in rows])
        return batch


class Scorer:
    """Metrics of an evaluation; `last` keeps the predictions behind them."""

    def __init__(
        self, names: Sequence[str], tags: bool, custom: Sequence[Metric] = (), columns: Mapping[str, Any] | None = None
    ) -> None:
        self.names, self.tags, self.custom, self.columns = names, tags, custom, dict(columns or {})
        self.last: LabelScores | None = None

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        labels, rows = evaluated.label_ids
        order = np.argsort(rows, kind="stable")
        if self.tags:
            self.last = self._tags(evaluated.predictions[0][order], labels[order])
        else:
            guesses = evaluated.predictions[order].argmax(-1)
            self.last = score_texts(self.names, self._called(labels[order]), self._called(guesses))
        return self.last.metrics | self._custom(self.last)

    def _tags(self, guesses: Any, labels: Any) -> LabelScores:
        kept = [row != IGNORED for row in labels]
        references = [self._called(row[at]) for row, at in zip(labels, kept, strict=True)]
        predictions = [self._called(row[at]) for row, at in zip(guesses, kept, strict=True)]
        return score_tags(self.names, references, predictions)

    def _called(self, classes: Any) -> list[str]:
        return [self.names[place] for place in classes.tolist()]

    def _custom(self, scores: LabelScores) -> dict[str, float]:
        found: dict[str, float] = {}
        for entry in self.custom:
            means, _ = entry(scores.predictions, scores.references, self.columns)
            taken = sorted(means.keys() & (found.keys() | scores.metrics.keys()))
            if taken:
                raise ConfigError(f"custom_metrics: {', '.join(taken)} is the name of another metric; choose a new one")
            found |= means
        return found


def report_sections(scores: LabelScores) -> list[Section]:
    """The table of classes, the table of entities where there are some, and the confusion matrix."""
    found: list[Section] = []
    if scores.entities is not None:
        found.append(("table", "Scores by entity type", _table("type", scores.entities.per_type)))
    found.append(("table", "Scores by class", _table("class", scores.labels.per_class)))
    names = [str(label) for label in scores.labels.labels]
    note = "Rows: the true class. Columns: the class that was predicted."
    matrix = sections.matrix(scores.labels.confusion, names, names, "true class", "predicted class", note)
    return [*found, ("matrix", "Confusion matrix", matrix)]


def _table(what: str, scores: Mapping[Any, Score]) -> dict[str, Any]:
    rows = [[str(name), score.precision, score.recall, score.f1, score.support] for name, score in scores.items()]
    return sections.table([what, "precision", "recall", "F1", "support"], rows)
