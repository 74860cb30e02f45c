"""Label and entity scores: by hand, and equal to scikit-learn and seqeval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.config.best_metric import CLASSIFICATION_METRICS, ENTITY_METRICS
from aligntune.errors import DataError
from aligntune.evaluation.label_scores import are_entity_tags, metric_names, score_tags, spans
from aligntune.evaluation.labels import (
    Score,
    entities,
    entity_report,
    label_report,
)


def test_labels_by_hand():
    #          a: precision 1/1, recall 1/2, F 2/3; b: precision 1/3, recall 1/1, F 1/2; c: nothing right
    report = label_report(["a", "a", "b", "c"], ["a", "b", "b", "b"])
    assert report.labels == ["a", "b", "c"]
    assert report.confusion == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert report.per_class["a"] == Score(1.0, 0.5, pytest.approx(2 / 3), 2)
    assert report.per_class["c"] == Score(0.0, 0.0, 0.0, 1)
    assert report.accuracy == 0.5
    assert report.f1_macro == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert report.f1_weighted == pytest.approx((2 * 2 / 3 + 1 / 2) / 4)
    # right 2, total 4: (2 * 4 - (2 * 1 + 1 * 3)) / sqrt((16 - 6) * (16 - 10))
    assert report.matthews_correlation == pytest.approx(3 / math.sqrt(60))
    assert set(report.metrics()) == set(CLASSIFICATION_METRICS)


def test_classes_that_never_occur_are_in_the_table_and_not_in_the_means():
    report = label_report([0, 1], [0, 1], labels=[0, 1, 2])
    assert report.confusion[2] == [0, 0, 0]
    assert report.per_class[2].support == 0
    assert report.f1_macro == 1.0


def test_one_class_has_no_correlation():
    assert label_report([1, 1], [1, 1]).matthews_correlation == 0.0


def test_bad_labels_are_named():
    with pytest.raises(DataError, match="3 labels but 2 predictions"):
        label_report([1, 2, 3], [1, 2])
    with pytest.raises(DataError, match="no labels"):
        label_report([], [])
    with pytest.raises(DataError, match="labels 7 are not among the classes 0, 1"):
        label_report([0, 1], [0, 7], labels=[0, 1])


labelled = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(labelled)
def test_equals_scikit_learn(pairs: list[tuple[int, int]]):
    sk = pytest.importorskip("sklearn.metrics")
    true, guess = map(list, zip(*pairs, strict=True))
    report = label_report(true, guess)
    close = {"abs": 1e-9}
    assert report.accuracy == pytest.approx(sk.accuracy_score(true, guess), **close)
    for average in ("macro", "weighted"):
        expected = sk.f1_score(true, guess, average=average, zero_division=0)
        assert report.metrics()[f"f1_{average}"] == pytest.approx(expected, **close)
    assert report.matthews_correlation == pytest.approx(sk.matthews_corrcoef(true, guess), **close)
    assert report.confusion == sk.confusion_matrix(true, guess, labels=report.labels).tolist()
    table = sk.precision_recall_fscore_support(true, guess, zero_division=0)
    for at, label in enumerate(report.labels):
        score = report.per_class[label]
        assert [score.precision, score.recall, score.f1, score.support] == pytest.approx(
            [float(column[at]) for column in table], **close
        )


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-PER", [("PER", 0, 1)]),  # a stray I opens an entity
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),  # a change of type ends one and opens another
        ("O O", []),
        ("S-PER B-LOC E-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("B I O B", [("_", 0, 1), ("_", 3, 3)]),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
    ],
)
def test_entities_by_hand(tags: str, found: list[tuple[str, int, int]]):
    assert entities(tags.split()) == found


def test_entity_scores_by_hand():
    # Wanted: PER 0-1 and LOC 3; found: PER 0-1, LOC 2 and ORG 3. One of 3 and one of 2 are right: F = 2 / 5.
    report = entity_report([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "B-LOC", "B-ORG"]])
    assert (report.precision, report.recall) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert report.f1 == pytest.approx(2 / 5)
    assert report.per_type == {"LOC": Score(0, 0, 0, 1), "ORG": Score(0, 0, 0, 0), "PER": Score(1, 1, 1, 1)}
    assert report.f1_macro == pytest.approx(1 / 3)
    assert report.f1_weighted == pytest.approx(1 / 2)
    assert report.accuracy == 0.5
    assert set(report.metrics()) == set(ENTITY_METRICS)


def test_entities_do_not_run_from_one_sentence_into_the_next():
    report = entity_report([["O", "B-PER"], ["I-PER"]], [["O", "B-PER"], ["I-PER"]])
    assert report.per_type["PER"].support == 2


@pytest.mark.parametrize(("names", "entity_tags"), [
    (["O", "B-PER", "I-PER"], True), (["O", "B-PER", "LABEL_2"], True), (["B-PER", "I-PER"], False), (["O", "NOUN"], False),
])  # fmt: skip
def test_entities_are_counted_where_the_tags_mark_them(names: list[str], entity_tags: bool):
    """A spare class (`LABEL_2`) that is predicted is no entity."""
    assert are_entity_tags(names) == entity_tags
    scores = score_tags(names, [[names[0], names[1]]], [[names[0], names[-1]]])
    assert (scores.entities is not None) == entity_tags
    assert set(metric_names(names, tags=True)) == set(scores.metrics)
    assert metric_names(names, tags=False) == CLASSIFICATION_METRICS


def test_spans_by_hand():
    words, sure = ["Ada", "Byron", "wrote", "."], [0.5, 1.0, 0.25, 1.0]
    assert spans(["O", "B-PER", "I-PER", "LABEL_3"], words, ["B-PER", "I-PER", "O", "LABEL_3"], sure) == [
        {"label": "PER", "start": 0, "end": 2, "text": "Ada Byron", "probability": 0.75}
    ]
    assert spans(["O", "NAME", "VERB"], words, ["NAME", "NAME", "VERB", "O"]) == [
        {"label": "NAME", "start": 0, "end": 1, "text": "Ada"},
        {"label": "NAME", "start": 1, "end": 2, "text": "Byron"},
        {"label": "VERB", "start": 2, "end": 3, "text": "wrote"},
    ]


def test_bad_tags_are_named():
    with pytest.raises(DataError, match="sentence 1 has 2 words but 1 predicted tags"):
        entity_report([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(DataError, match="'PER' is not an entity tag"):
        entities(["PER"])


tags = st.sampled_from(["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("PER", "LOC", "a-b"))])
sentences = st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=10), min_size=1, max_size=6)


@settings(deadline=None, max_examples=80)
@given(sentences)
@pytest.mark.filterwarnings("ignore")
def test_equals_seqeval(rows: list[list[tuple[str, str]]]):
    seq = pytest.importorskip("seqeval.metrics")
    true = [[left for left, _ in row] for row in rows]
    guess = [[right for _, right in row] for row in rows]
    report = entity_report(true, guess)
    expected = [
        seq.precision_score(true, guess),
        seq.recall_score(true, guess),
        seq.f1_score(true, guess),
        seq.f1_score(true, guess, average="macro"),
        seq.f1_score(true, guess, average="weighted"),
        seq.accuracy_score(true, guess),
    ]
    # Without any entity seqeval's averages over types are nan; a score without a denominator is 0 here.
    assert list(report.metrics().values()) == pytest.approx(
        [float(np.nan_to_num(value)) for value in expected], abs=1e-9
    )


def test_of_many_classes_those_with_the_most_mistakes_are_shown():
    report = label_report([0, 1, 2, 2, 3, 3, 3], [0, 1, 3, 3, 2, 3, 0], labels=list(range(10_000)))
    labels, counts, said = report.most_confused(2)
    assert (labels, counts) == ([2, 3], [[0, 2], [1, 1]])
    assert said == "Of 10000 classes the 2 with the most mistakes."
    assert label_report([0, 1], [1, 1]).most_confused(2) == ([0, 1], [[0, 1], [0, 1]], "")
