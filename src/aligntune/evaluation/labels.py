"""How good are predicted labels? Classification scores, and entity scores for tagged words.

The numbers are scikit-learn's (`zero_division=0`) and seqeval's (default mode, the rules of conlleval): a score whose
denominator is zero is 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aligntune.config.best_metric import CLASSIFICATION_METRICS, ENTITY_METRICS
from aligntune.errors import DataError

SHOWN_CLASSES = 100
"""Most classes of a confusion matrix that is shown."""

Entity = tuple[str, int, int]
"""Type, and the places of the first and last word."""


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1 of one class, and how often it occurs in the references."""

    precision: float
    recall: float
    f1: float
    support: int

    @classmethod
    def of(cls, matched: int, predicted: int, wanted: int) -> Score:
        """From counts of right, predicted and wanted items."""
        precision = matched / predicted if predicted else 0.0
        recall = matched / wanted if wanted else 0.0
        f1 = 2 * matched / (predicted + wanted) if predicted + wanted else 0.0
        return cls(precision, recall, f1, wanted)


@dataclass(frozen=True)
class LabelReport:
    """Scores of single labels. `pairs`: (true label, given label) -> rows, where there are any."""

    labels: list[Any]
    pairs: Mapping[tuple[Any, Any], int]
    per_class: dict[Any, Score]
    accuracy: float
    f1_macro: float
    f1_weighted: float
    matthews_correlation: float

    def metrics(self) -> dict[str, float]:
        """The scalars, under the names of `CLASSIFICATION_METRICS`."""
        return {name: getattr(self, name) for name in CLASSIFICATION_METRICS}

    @cached_property
    def confusion(self) -> list[list[int]]:
        """`[i][j]`: rows of true class `labels[i]` that were given `labels[j]`."""
        return self._matrix(self.labels)

    def most_confused(self, count: int = SHOWN_CLASSES) -> tuple[list[Any], list[list[int]], str]:
        """`labels` and `confusion`; of more than `count` classes, of those with the most mistakes, and a sentence that says so."""
        if len(self.labels) <= count:
            return self.labels, self.confusion, ""
        mistakes: Counter[Any] = Counter()
        for pair, rows in self.pairs.items():
            if pair[0] != pair[1]:
                mistakes.update(dict.fromkeys(pair, rows))
        worst = set(sorted(self.labels, key=lambda label: -mistakes[label])[:count])
        shown = [label for label in self.labels if label in worst]
        return shown, self._matrix(shown), f"Of {len(self.labels)} classes the {count} with the most mistakes."

    def _matrix(self, labels: Sequence[Any]) -> list[list[int]]:
        return [[self.pairs.get((true, guess), 0) for guess in labels] for true in labels]


def label_report(
    references: Sequence[Any], predictions: Sequence[Any], labels: Sequence[Any] | None = None
) -> LabelReport:
    """Accuracy, macro and weighted F1, Matthews correlation, table and confusion matrix.

    `labels`: all classes, in the order of the table (default: those that occur, sorted). Averages are over the classes
    that occur in references or predictions, whatever `labels` adds, as scikit-learn's are.
    """
    _same_length(references, predictions, "labels")
    pairs = Counter(zip(references, predictions, strict=True))
    wanted, predicted = Counter(references), Counter(predictions)
    occurring = wanted.keys() | predicted.keys()
    order = list(labels) if labels is not None else sorted(occurring)
    unknown = sorted(map(str, occurring - set(order)))
    if unknown:
        raise DataError(f"labels {', '.join(unknown)} are not among the classes {', '.join(map(str, order))}")
    scores = {label: Score.of(pairs[label, label], predicted[label], wanted[label]) for label in order}
    return LabelReport(
        labels=order,
        pairs=pairs,
        per_class=scores,
        accuracy=sum(pairs[label, label] for label in order) / len(references),
        f1_macro=_macro(scores[label] for label in occurring),
        f1_weighted=_weighted(scores.values()),
        matthews_correlation=_matthews(pairs, wanted, predicted, len(references)),
    )


def _matthews(pairs: Counter[tuple[Any, Any]], wanted: Counter[Any], predicted: Counter[Any], total: int) -> float:
    """Gorodkin's correlation of two labellings (the Matthews correlation for two classes); 0 if either is constant."""
    right = sum(count for (true, guess), count in pairs.items() if true == guess)
    covariance = right * total - sum(wanted[label] * predicted[label] for label in wanted)
    spread = (total**2 - sum(n**2 for n in wanted.values())) * (total**2 - sum(n**2 for n in predicted.values()))
    return covariance / math.sqrt(spread) if spread else 0.0


@dataclass(frozen=True)
class EntityReport:
    """Scores of whole entities: type and both ends must be right. `precision`, `recall`, `f1` are micro averages."""

    per_type: dict[str, Score]
    precision: float
    recall: float
    f1: float
    f1_macro: float
    f1_weighted: float
    accuracy: float
    """Share of words with the right tag."""

    def metrics(self) -> dict[str, float]:
        """The scalars, under the names of `ENTITY_METRICS`."""
        return {name: getattr(self, name) for name in ENTITY_METRICS}


def entity_report(references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> EntityReport:
    """Entity scores of tag sequences, one of each per sentence and one tag per word (BIO, also IOE and BIOES)."""
    _same_length(references, predictions, "sentences")
    for row, (tags, guesses) in enumerate(zip(references, predictions, strict=True)):
        if len(tags) != len(guesses):
            raise DataError(f"sentence {row} has {len(tags)} words but {len(guesses)} predicted tags")
    wanted = {(row, entity) for row, tags in enumerate(references) for entity in entities(tags)}
    found = {(row, entity) for row, tags in enumerate(predictions) for entity in entities(tags)}
    total = Score.of(len(wanted & found), len(found), len(wanted))
    right, guessed, true = (Counter(entity[0] for _, entity in items) for items in (wanted & found, found, wanted))
    per_type = {kind: Score.of(right[kind], guessed[kind], true[kind]) for kind in sorted(true.keys() | guessed.keys())}
    words = [pair for tags in zip(references, predictions, strict=True) for pair in zip(*tags, strict=True)]
    return EntityReport(
        per_type=per_type,
        precision=total.precision,
        recall=total.recall,
        f1=total.f1,
        f1_macro=_macro(per_type.values()),
        f1_weighted=_weighted(per_type.values()),
        accuracy=sum(tag == guess for tag, guess in words) / len(words) if words else 0.0,
    )


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, by the rules of conlleval: a stray I or E opens one, a change of type ends one."""
    found = []
    start = 0
    before, before_kind = "O", "_"
    for at, tag in enumerate([*tags, "O"]):
        mark, kind = _split(tag)
        changed = kind != before_kind
        if before != "O" and (before in "ES" or mark in "BSO" or changed):
            found.append((before_kind, start, at - 1))
        if mark != "O" and (mark in "BS" or before in "ESO" or changed):
            start = at
        before, before_kind = mark, kind
    return found


def _split(tag: str) -> tuple[str, str]:
    """Mark and entity type of a tag; a mark alone has the type "_"."""
    mark, dash, kind = tag.partition("-")
    if mark not in ("B", "I", "E", "S", "O") or (mark == "O" and dash):
        raise DataError(f"{tag!r} is not an entity tag: use O, B-TYPE and I-TYPE (or the E- and S- of BIOES)")
    return mark, kind or "_"


def _macro(scores: Iterable[Score]) -> float:
    values = [score.f1 for score in scores]
    return sum(values) / len(values) if values else 0.0


def _weighted(scores: Iterable[Score]) -> float:
    counted = [(score.f1, score.support) for score in scores]
    total = sum(support for _, support in counted)
    return sum(f1 * support for f1, support in counted) / total if total else 0.0


def _same_length(references: Sequence[Any], predictions: Sequence[Any], what: str) -> None:
    if len(references) != len(predictions):
        raise DataError(f"{len(references)} {what} but {len(predictions)} predictions")
    if not references:
        raise DataError(f"there are no {what} to score")
