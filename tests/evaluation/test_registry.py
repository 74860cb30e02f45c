"""Metrics by config: what runs, what each needs, and what is refused at the start."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from aligntune.config.sft import EvaluationConfig
from aligntune.errors import ConfigError, DataError, MissingExtra, ModelError
from aligntune.evaluation.registry import Metric, check_best_metric, compute, metrics_from_config

ALL_OFF = {"compute_rouge": False, "compute_bleu": False}


def exact(predictions, references):
    return {"exact": [left == right for left, right in zip(predictions, references, strict=True)]}


def by_level(predictions, references, level):
    return {f"level_{each}": float(level.count(each)) for each in sorted(set(level))}


def all_columns(predictions, references, **columns):
    return {f"columns_{name}": len(values) for name, values in columns.items()}


def test_every_switch_switches_its_metric():
    assert [entry.name for entry in metrics_from_config(EvaluationConfig())] == ["rouge", "bleu"]
    switches = {
        "compute_rouge": "rouge",
        "compute_bleu": "bleu",
        "compute_meteor": "meteor",
        "compute_bertscore": "bertscore",
        "compute_semantic_similarity": "semantic_similarity",
        "compute_codebleu": "codebleu",
    }
    for setting, name in switches.items():
        chosen = metrics_from_config(EvaluationConfig(**{**ALL_OFF, setting: True}))
        assert [entry.name for entry in chosen] == [name]
    assert set(switches) == {name for name in EvaluationConfig.model_fields if name.startswith("compute_")} - {
        "compute_perplexity"
    }


def test_metrics_give_the_names_they_promise():
    pytest.importorskip("tree_sitter_python")
    config = EvaluationConfig(compute_meteor=True, compute_codebleu=True, custom_metrics=[exact])
    metrics = metrics_from_config(config)
    totals, by_row = compute(metrics, ["x = y", "a b c d"], ["x = y", "a b c e"])
    promised = {name for entry in metrics for name in entry.produces or ()}
    assert set(totals) == promised | {"exact"}
    assert totals["exact"] == 0.5
    assert by_row["exact"] == [1.0, 0.0]
    # ROUGE-L of the second row: 3 of 4 words; BLEU of the corpus; both rows have METEOR.
    assert totals["rougeL"] == pytest.approx((1 + 3 / 4) / 2)
    assert 0 < totals["bleu"] < 100
    assert by_row["meteor"][0] > by_row["meteor"][1] > 0


def test_codebleu_reads_fenced_code_and_the_language_column():
    pytest.importorskip("tree_sitter_python")
    (entry,) = metrics_from_config(EvaluationConfig(**ALL_OFF, compute_codebleu=True))
    answer = "Sure:\n```python\ndef f(a):\n    return a\n```"
    totals, _ = entry([answer], ["def g(b):\n    return b"])
    assert totals["codebleu_syntax_match"] == 1.0
    with pytest.raises(ConfigError, match="does not know the language 'klingon'"):
        entry([answer], ["x"], {"language": ["klingon"]})


def test_encoder_metrics_use_the_models_of_the_config(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=8
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=4, max_position_embeddings=8, **shape)).save_pretrained(tmp_path)
    config = EvaluationConfig(
        **ALL_OFF,
        compute_bertscore=True,
        compute_semantic_similarity=True,
        bertscore_model=str(tmp_path),
        semantic_similarity_model=str(tmp_path),
    )
    metrics = metrics_from_config(config)
    for entry in metrics:
        entry.check()
    totals, by_row = compute(metrics, ["a b", "b"], ["a b", "a"])
    assert set(totals) == {"bertscore_precision", "bertscore_recall", "bertscore_f1", "semantic_similarity"}
    assert by_row["bertscore_f1"][0] == pytest.approx(1.0, abs=1e-5)
    assert by_row["semantic_similarity"][1] < 1


def test_a_missing_encoder_is_an_error_at_the_start(tmp_path: Path):
    config = EvaluationConfig(**ALL_OFF, compute_bertscore=True, bertscore_model=str(tmp_path / "nothing"))
    (entry,) = metrics_from_config(config)
    with pytest.raises(ModelError, match=r"bertscore_model: the encoder '.*nothing' cannot be loaded"):
        entry.check()


@pytest.mark.parametrize(
    ("setting", "package"), [("compute_rouge", "rouge_score.rouge_scorer"), ("compute_bleu", "sacrebleu")]
)
def test_a_missing_package_is_an_error_at_the_start(setting: str, package: str, monkeypatch: pytest.MonkeyPatch):
    (entry,) = metrics_from_config(EvaluationConfig(**{**ALL_OFF, setting: True}))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=setting):
        entry.check()


def test_custom_metrics_get_the_columns_they_name():
    metrics = metrics_from_config(EvaluationConfig(**ALL_OFF, custom_metrics=[by_level, all_columns]))
    columns = {"level": [1, 2, 2], "id": [7, 8, 9]}
    for entry in metrics:
        entry.check(columns)
    totals, by_row = compute(metrics, ["a"] * 3, ["b"] * 3, columns)
    assert totals == {"level_1": 1.0, "level_2": 2.0, "columns_level": 3.0, "columns_id": 3.0}
    assert by_row == {}
    with pytest.raises(ConfigError, match=r"'by_level' takes level, and the rows have id; .*preserve_columns"):
        metrics[0].check({"id"})
    metrics[1].check({"id"})


def test_custom_metrics_by_address(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "def length(predictions, references):\n    return {'length': len(predictions[0])}\n"
    )
    (entry,) = metrics_from_config(EvaluationConfig(**ALL_OFF, custom_metrics=[f"{tmp_path}/mine.py:length"]))
    assert (entry.name, entry.produces) == ("length", None)
    assert entry(["abc"], ["x"])[0] == {"length": 3.0}
    with pytest.raises(ConfigError, match="custom_metrics: there is no module 'no_such_module_here'"):
        metrics_from_config(EvaluationConfig(custom_metrics=["no_such_module_here:f"]))


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        (3.0, "should return a dict"),
        ({"m": "high"}, "'high', not a number"),
        ({"m": [1.0]}, "'m' has 1 scores for 2 rows"),
        ({"m": None}, "None, not a number"),
    ],
)
def test_wrong_results_are_named(result: object, complaint: str):
    entry = Metric("odd", lambda predictions, references: result, "custom_metrics")  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=complaint):
        entry(["a", "b"], ["a", "b"])


def test_two_metrics_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="'again' gives exact, which another metric gives too"):
        compute([Metric("one", exact, "custom_metrics"), Metric("again", exact, "custom_metrics")], ["a"], ["a"])


def test_a_failing_metric_says_which():
    def broken(predictions, references):
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        compute([Metric("broken", broken, "custom_metrics")], ["a"], ["a"])
    assert caught.value.__notes__ == ["in the metric 'broken' (custom_metrics)"]


def test_empty_references_are_an_error():
    with pytest.raises(DataError, match="reference 1 is empty"):
        compute([], ["a", "b"], ["a", "  "])


def test_rows_without_references(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        assert metrics_from_config(EvaluationConfig(), has_references=False) == []
    assert "no rouge, bleu" in caplog.text
    with pytest.raises(ConfigError, match="compute_bleu compare answers with references"):
        metrics_from_config(EvaluationConfig(compute_bleu=True), has_references=False)


def test_best_metric_must_exist():
    metrics = metrics_from_config(EvaluationConfig(compute_meteor=True))
    for name in ("eval_rougeL", "rougeL", "eval_bleu", "eval_meteor", "eval_loss", "perplexity"):
        assert check_best_metric(name, metrics) == f"eval_{name.removeprefix('eval_')}"
    with pytest.raises(ConfigError, match=r"no evaluation of this run gives 'eval_rougel'; did you mean eval_rougeL\?"):
        check_best_metric("eval_rougel", metrics)
    with pytest.raises(ConfigError, match=r"gives 'eval_bertscore_f1'.*It gives eval_bleu, "):
        check_best_metric("eval_bertscore_f1", metrics)
    assert check_best_metric("f1", metrics, others=["f1"]) == "eval_f1"
    assert check_best_metric("exact", [Metric("exact", exact, "custom_metrics")]) == "eval_exact"
