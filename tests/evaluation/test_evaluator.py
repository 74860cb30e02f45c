"""From a model and rows to metrics and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aligntune.config.sft import EvaluationConfig
from aligntune.errors import ConfigError, DataError
from aligntune.evaluation.answers import EvaluationRow, GreedyGenerator
from aligntune.evaluation.evaluator import AnswerEvaluator
from aligntune.evaluation.registry import Metric, metrics_from_config


class Echo:
    """Answers with the last word of the prompt; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def generate(self, prompts, *, max_new_tokens, tools=None):
        self.calls.append((len(prompts), max_new_tokens))
        return [str(prompt).split()[-1] for prompt in prompts]


ROWS = [EvaluationRow(f"say w{at}", f"w{at if at % 2 else 0}", {"id": at}) for at in range(10)]


def test_metrics_and_records_of_every_row(tmp_path: Path):
    metrics = metrics_from_config(EvaluationConfig(compute_bleu=False))
    evaluator = AnswerEvaluator(Echo(), ROWS, metrics, max_samples=None)
    evaluator.check()
    # Rows 0, 1, 3, 5, 7 and 9 repeat their reference.
    assert evaluator() == {name: pytest.approx(0.6) for name in ("rouge1", "rougeL")} | {"rouge2": 0.0}
    evaluation = evaluator.last
    assert evaluation is not None
    path = evaluation.write_predictions(tmp_path / "eval" / "predictions.jsonl")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert records[3] == {
        "row": 3,
        "prompt": "say w3",
        "reference": "w3",
        "prediction": "w3",
        "scores": {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0},
        "columns": {"id": 3},
    }


def test_samples_are_bounded_and_the_same_every_time():
    generator = Echo()
    evaluator = AnswerEvaluator(generator, ROWS, [], max_samples=4, max_new_tokens=9, seed=3)
    evaluator()
    first = [record["row"] for record in evaluator.last.predictions]
    evaluator()
    assert [record["row"] for record in evaluator.last.predictions] == first
    assert generator.calls == [(4, 9), (4, 9)]
    other = AnswerEvaluator(generator, ROWS, [], max_samples=4, seed=4)
    assert other.chosen != evaluator.chosen


def test_custom_metrics_see_the_columns_of_the_chosen_rows():
    def mean_id(predictions, references, id):
        return {"mean_id": sum(id) / len(id)}

    evaluator = AnswerEvaluator(Echo(), ROWS, [Metric("mean_id", mean_id, "custom_metrics")], max_samples=3)
    evaluator.check()
    assert evaluator() == {"mean_id": pytest.approx(sum(evaluator.chosen) / 3)}


def test_what_is_missing_is_missed_at_the_start():
    def needs(predictions, references, answer_key):
        return {}

    with pytest.raises(ConfigError, match="takes answer_key, and the rows have id"):
        AnswerEvaluator(Echo(), ROWS, [Metric("needs", needs, "custom_metrics")]).check()
    with pytest.raises(DataError, match="no evaluation rows"):
        AnswerEvaluator(Echo(), [], []).check()
    with pytest.raises(DataError, match="evaluation row 1 has an empty reference"):
        AnswerEvaluator(Echo(), [ROWS[0], EvaluationRow("say", " ")], []).check()


def test_with_a_real_model(model, tokenizer):
    rows = [EvaluationRow([{"role": "user", "content": "w1 w2"}], "w3"), EvaluationRow("w4", "w5 w6")]
    metrics = metrics_from_config(EvaluationConfig())
    evaluator = AnswerEvaluator(GreedyGenerator.of(model, tokenizer), rows, metrics, max_new_tokens=5)
    evaluator.check()
    scores = evaluator()
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "bleu"}
    # The model's own answers as references give full marks.
    answers = [record["prediction"] for record in evaluator.last.predictions]
    assert all(answers)
    copied = [EvaluationRow(row.prompt, answer) for row, answer in zip(rows, answers, strict=True)]
    again = AnswerEvaluator(GreedyGenerator.of(model, tokenizer, batch_size=1), copied, metrics, max_new_tokens=5)()
    assert again["rouge1"] == again["rougeL"] == 1.0
