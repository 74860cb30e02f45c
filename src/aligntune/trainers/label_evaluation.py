"""How does an evaluation of a classifier become metrics and sections of the report?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from aligntune.data.collate import PaddedCollator, round_up
from aligntune.data.masks import IGNORED
from aligntune.errors import ConfigError
from aligntune.evaluation.label_scores import LabelScores, score_table, score_tags, score_texts
from aligntune.evaluation.labels import Score
from aligntune.evaluation.registry import Metric
from aligntune.reporting import sections
from aligntune.trainers.filling import NO_ROW
from aligntune.trainers.passes import cut

Section = tuple[str, str, dict[str, Any]]
"""Kind, title, payload."""


class RowCollator:
    """Padded rows; `row` [B] where the rows have it (those of an evaluation); else, with `micro_batch_tokens`, the `pieces` of a
    training step, whose rows are padded to the longest of a piece."""

    def __init__(self, collator: PaddedCollator, micro_batch_tokens: int | None = None) -> None:
        self.collator, self.micro_batch_tokens = collator, micro_batch_tokens

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(self.collator(rows))
        if "row" in rows[0]:
            batch["row"] = torch.as_tensor([row["row"] for row in rows])
        elif self.micro_batch_tokens is not None:
            lengths = [round_up(len(row["input_ids"]), self.collator.pad_to_multiple_of) for row in rows]
            places = cut(lengths, self.micro_batch_tokens, padded=True)
            batch["pieces"] = [self.collator([rows[at] for at in piece]) for piece in places]
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
        order = np.argsort(rows, kind="stable")[(rows == NO_ROW).sum() :]
        if self.tags:
            self.last = self._tags(evaluated.predictions[0][order], labels[order])
        else:
            guesses = evaluated.predictions[0][order]
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
    labels, confusion, of_many = scores.labels.most_confused()
    names = [str(label) for label in labels]
    note = "Rows: the true class. Columns: the class that was predicted."
    matrix = sections.matrix(confusion, names, names, "true class", "predicted class", f"{note} {of_many}".strip())
    return [*found, ("matrix", "Confusion matrix", matrix)]


def _table(what: str, scores: Mapping[Any, Score]) -> dict[str, Any]:
    return sections.table(*score_table(what, scores))
