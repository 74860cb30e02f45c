"""How good is a saved classifier on labelled texts or tagged words?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from aligntune.config.enums import TaskType
from aligntune.config.run import SFTRunConfig
from aligntune.data import LabelSet, row_reader
from aligntune.data.examples import LabelledExample, TaggedExample
from aligntune.data.labels import find_shared_labels, labels_of_model
from aligntune.errors import DataError
from aligntune.evaluation.classifier import Classifier
from aligntune.evaluation.label_scores import LabelScores, metric_names, score_table, score_tags, score_texts, spans
from aligntune.evaluation.labels import Score
from aligntune.evaluation.registry import custom_metrics
from aligntune.evaluation.saved_base import SavedEvaluation, Table, batch_size, check_names, load_for_evaluation
from aligntune.models.heads import SavedHead, longest_input

logger = logging.getLogger(__name__)


def evaluate_classifier(
    run: SFTRunConfig, rows: Any, head: SavedHead, wanted: Sequence[str] | None = None
) -> SavedEvaluation:
    """Every row classified, the scores over all, and a record of each."""
    source, tags = run.sources[0], head.task is TaskType.TOKEN_CLASSIFICATION
    functions = [
        name for name in wanted or run.evaluation.custom_metrics or [] if not isinstance(name, str) or ":" in name
    ]
    shown = check_names([name for name in wanted or [] if name not in functions], metric_names(head.names, tags))
    labels = labels_of_model(head.names, find_shared_labels([(rows, source)], at_least=1))
    reader = row_reader(rows, source)
    examples: list[Any] = [reader(row, index) for index, row in enumerate(rows)]
    kept = [at for at, example in enumerate(examples) if _has_words(example)]
    if not kept:
        raise DataError(f"none of the {len(examples)} rows has anything to classify")
    if len(kept) < len(examples):
        logger.warning("%d of %d rows are empty and are left out", len(examples) - len(kept), len(examples))
    model, tokenizer = load_for_evaluation(run, head)
    longest = longest_input(run.model.name_or_path, tokenizer, run.model.max_seq_length)
    classifier = Classifier(model, tokenizer, head.names, tags, longest, batch_size(run))
    judge = _judge_sentences if tags else _judge_texts
    scores, records = judge(classifier, labels, [examples[at] for at in kept])
    columns = {name: [rows[at][name] for at in kept] for name in source.preserve_columns or ()}
    metrics = {name: value for name, value in scores.metrics.items() if not shown or name in shown}
    for entry in custom_metrics(functions):
        entry.check(columns)
        metrics |= entry(scores.predictions, scores.references, columns)[0]
    for at, record in zip(kept, records, strict=True):
        record["row"] = at
    return SavedEvaluation(metrics, records, head.task.value, _tables(scores))


def _judge_texts(classifier: Classifier, labels: LabelSet, examples: Sequence[LabelledExample]) -> tuple[LabelScores, list[dict[str, Any]]]:  # fmt: skip
    references = [labels.names[labels.id_of(example.label)] for example in examples]
    found = classifier.classify([example.text for example in examples])
    records = [
        {"row": 0, "prompt": example.text, "reference": reference, "prediction": guess.pop("label"), **guess}
        for example, reference, guess in zip(examples, references, found, strict=True)
    ]
    return score_texts(labels.names, references, [record["prediction"] for record in records]), records


def _judge_sentences(classifier: Classifier, labels: LabelSet, examples: Sequence[TaggedExample]) -> tuple[LabelScores, list[dict[str, Any]]]:  # fmt: skip
    words = [example.tokens for example in examples]
    references = [[labels.names[labels.id_of(tag)] for tag in example.tags] for example in examples]
    found = classifier.tag_words(words)
    records = [
        {"row": 0, "words": row, "reference": tags, "prediction": guess, "probabilities": sure,
         "spans": spans(labels.names, row, guess, sure)}
        for row, tags, (guess, sure) in zip(words, references, found, strict=True)
    ]  # fmt: skip
    return score_tags(labels.names, references, [guess for guess, _ in found]), records


def _tables(scores: LabelScores) -> list[Table]:
    found = [] if scores.entities is None else [_table("Entities", "type", scores.entities.per_type)]
    labels, counts, of_many = scores.labels.most_confused()
    names = [str(name) for name in labels]
    confusion = [[name, *row] for name, row in zip(names, counts, strict=True)]
    matrix: Table = (f"Confusion matrix (rows: the true class). {of_many}".rstrip(". "), ["", *names], confusion)
    return [*found, _table("Classes", "class", scores.labels.per_class), matrix]


def _table(title: str, what: str, scores: dict[Any, Score]) -> Table:
    return title, *score_table(what, scores)


def _has_words(example: LabelledExample | TaggedExample) -> bool:
    text = example.text if isinstance(example, LabelledExample) else " ".join(example.tokens)
    return bool(text.strip())
