"""How good are a classifier's predictions? From predicted classes to metrics and the tables behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligntune.config.best_metric import CLASSIFICATION_METRICS, ENTITY_METRICS
from aligntune.evaluation.labels import (
    EntityReport,
    LabelReport,
    Score,
    entities,
    entity_report,
    label_report,
)

_ENTITY_TAG = re.compile(r"O|[BIES](-.+)?")


@dataclass(frozen=True)
class LabelScores:
    """Predictions by name, in the order of the rows. `labels` scores texts or single words, `entities` whole entities."""

    references: list[Any]
    predictions: list[Any]
    labels: LabelReport
    entities: EntityReport | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The scalars: of entities where there are some (with the words' correlation), else of labels."""
        if self.entities is None:
            return self.labels.metrics()
        return self.entities.metrics() | {"matthews_correlation": self.labels.matthews_correlation}


def are_entity_tags(names: Sequence[str]) -> bool:
    """Whether the classes are O, B-TYPE, I-TYPE (or BIOES), so that entities can be counted."""
    return "O" in names and all(_ENTITY_TAG.fullmatch(name) for name in names if not name.startswith("LABEL_"))


def metric_names(names: Sequence[str], tags: bool) -> tuple[str, ...]:
    """The metrics that a classifier with these classes gives."""
    return (*ENTITY_METRICS, "matthews_correlation") if tags and are_entity_tags(names) else CLASSIFICATION_METRICS


def score_texts(names: Sequence[str], references: Sequence[str], predictions: Sequence[str]) -> LabelScores:
    """One label a text."""
    return LabelScores(list(references), list(predictions), label_report(references, predictions, names))


def score_tags(
    names: Sequence[str], references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> LabelScores:
    """One tag a word, sentence by sentence; entities are counted where the tags are BIO or BIOES."""
    words = [tag for row in references for tag in row]
    guesses = [tag for row in predictions for tag in row]
    report = label_report(words, guesses, names)
    of_entities = entity_report(references, [_plain(row) for row in predictions]) if are_entity_tags(names) else None
    return LabelScores([list(row) for row in references], [list(row) for row in predictions], report, of_entities)


def score_table(what: str, scores: Mapping[Any, Score]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table of scores by `what` ("class", "type")."""
    rows = [[str(name), score.precision, score.recall, score.f1, score.support] for name, score in scores.items()]
    return [what, "precision", "recall", "F1", "support"], rows


def spans(
    names: Sequence[str], words: Sequence[str], tags: Sequence[str], probabilities: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """The entities of a sentence: `label`, `start` and `end` (words, end excluded), `text`, mean `probability` of the tags.

    With classes `names` of another scheme than BIO, each word whose tag is not "O" is a span of its own.
    """
    if are_entity_tags(names):
        found = [(kind, start, last + 1) for kind, start, last in entities(_plain(tags))]
    else:
        found = [(tag, place, place + 1) for place, tag in enumerate(tags) if tag != "O"]
    records: list[dict[str, Any]] = []
    for kind, start, end in found:
        record: dict[str, Any] = {"label": kind, "start": start, "end": end, "text": " ".join(words[start:end])}
        if probabilities is not None:
            record["probability"] = sum(probabilities[start:end]) / (end - start)
        records.append(record)
    return records


def _plain(tags: Sequence[str]) -> list[str]:
    """Spare classes of a head that is larger than the label set (`LABEL_7`) are no entities."""
    return [tag if _ENTITY_TAG.fullmatch(tag) else "O" for tag in tags]
