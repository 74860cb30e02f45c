"""`aligntune eval`: every kind of rows, the predictions file, and what it says to mistakes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from aligntune.api import evaluate
from aligntune.cli import evaluate as verb
from aligntune.errors import ConfigError, DataError, MissingExtra, ModelError
from shell import aligntune

PAIRS = [{"prompt": "say red", "chosen": "red", "rejected": "green blue"}, {"prompt": "say two", "chosen": "two", "rejected": "one"}]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("eval") / "model")


def test_table_predictions_and_summary(model: Path, tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    verb.add_to(app)
    app.command("other")(lambda: None)
    data = tiny.write_rows(tmp_path / "chats.jsonl", tiny.chats(5))
    output = tmp_path / "said.jsonl"
    result = CliRunner().invoke(
        app, ["eval", str(model), str(data), "--metrics", "perplexity,rouge", "--limit", "3", "--output", str(output), "evaluation.max_new_tokens=2"]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 3
    assert all(
        {"row", "prompt", "reference", "prediction", "perplexity", "tokens"} <= set(record) for record in records
    )
    metrics = json.loads(output.with_suffix(".metrics.json").read_text())["metrics"]
    assert set(metrics) == {"loss", "perplexity", "rouge1", "rouge2", "rougeL"}
    tokens = sum(record["tokens"] for record in records)
    mean = sum(record["tokens"] * math.log(record["perplexity"]) for record in records) / tokens
    assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert "perplexity" in result.output


def test_an_earlier_evaluation_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(3):
        found.append(verb._free("predictions"))
        found[-1].touch()
    assert [path.name for path in found] == ["predictions.jsonl", "predictions-2.jsonl", "predictions-3.jsonl"]


def test_perplexity_at_any_batch_size(model: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "text.jsonl", [{"text": "red green " * at} for at in range(1, 9)])
    found = [evaluate(str(model), str(data), batch_size=size, precision="fp32").metrics["perplexity"] for size in (1, 3, 8)]  # fmt: skip
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(("asked", "rows", "losses"), [({}, None, 8), ({"batch_size": 3}, 3, 3)])
def test_batch_size_bounds_answers_only_when_it_is_set(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, int], rows: int | None, losses: int
) -> None:
    from aligntune.evaluation import saved_text
    from aligntune.rollouts import occasional

    seen: list[int | None] = []
    select, measure = occasional.select_engine, saved_text.row_losses
    monkeypatch.setattr(occasional, "select_engine", lambda *a, **k: seen.append(k["max_rows"]) or select(*a, **k))
    monkeypatch.setattr(saved_text, "row_losses", lambda *a, **k: seen.append(k["batch_size"]) or measure(*a, **k))
    data = tiny.write_rows(tmp_path / "chats.jsonl", tiny.chats(4))
    evaluate(str(model), str(data), overrides=["evaluation.max_new_tokens=2"], **asked)
    assert seen == [losses, rows]


def test_preference_pairs(model: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "pairs.jsonl", PAIRS)
    found = evaluate(str(model), str(data), precision="fp32")
    margins = [row["chosen_logp"] - row["rejected_logp"] for row in found.predictions]
    assert found.task == "preference"
    assert found.metrics["logps/margins"] == pytest.approx(sum(margins) / 2)
    assert found.metrics["logps/accuracies"] == sum(margin > 0 for margin in margins) / 2


def test_mistakes(model: Path, tmp_path: Path) -> None:
    data = str(tiny.write_rows(tmp_path / "chats.jsonl", tiny.chats(3)))
    with pytest.raises(ConfigError, match="did you mean rouge"):
        evaluate(str(model), data, metrics=["rogue"])
    with pytest.raises(ConfigError, match="has no head for text_classification"):
        evaluate(str(model), data, task="text_classification")
    with pytest.raises(ConfigError, match="streaming"):
        evaluate(str(model), data, overrides=["dataset.streaming=true"])
    with pytest.raises(DataError, match=r"chat\.jsonl"):
        evaluate(str(model), str(tmp_path / "chat.jsonl"))


def test_an_output_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = aligntune("eval", tmp_path / "no-model", tmp_path / "no-rows", "--output", tmp_path / "file" / "p.jsonl")
    assert done.returncode == 2
    assert "cannot write" in done.stderr


def test_a_benchmark_without_the_harness_is_said_before_the_work(tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("the harness is installed")
    done = aligntune("eval", tmp_path / "no-model", tmp_path / "no-rows", "--harness", "hellaswag")
    assert done.returncode == 2
    assert "aligntune[harness]" in done.stderr


def test_the_model_of_a_named_metric(model: Path, tmp_path: Path) -> None:
    data = str(tiny.write_rows(tmp_path / "chats.jsonl", tiny.chats(3)))
    nowhere = ["evaluation.bertscore_model=./nowhere"]
    with pytest.raises((ModelError, MissingExtra)):
        evaluate(str(model), data, metrics=["bertscore"], overrides=nowhere)
    with pytest.raises(ConfigError, match="needs compute_bertscore"):
        evaluate(str(model), data, overrides=nowhere)


def test_a_setting_of_training_is_refused(model: Path, tmp_path: Path) -> None:
    data = str(tiny.write_rows(tmp_path / "chats.jsonl", tiny.chats(3)))
    with pytest.raises(
        ConfigError, match=r"override learning_rate=3: train\.learning_rate: has no effect on an evaluation"
    ):
        evaluate(str(model), data, overrides=["learning_rate=3"])
    with pytest.raises(ConfigError, match=r"logging\.output_dir: has no effect on an evaluation"):
        evaluate(str(model), data, output_dir=str(tmp_path))
