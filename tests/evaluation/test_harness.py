"""lm-evaluation-harness on a local task, against the same choice made by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from aligntune.errors import ConfigError, MissingExtra
from aligntune.evaluation.harness import _report, run_harness

QUESTIONS = [{"question": f"w{at} w{at + 1}", "choices": ["w20", "w21 w22"], "answer": at % 2} for at in range(6)]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    return tmp_path


@pytest.mark.slow
def test_a_local_task_by_hand(model, tokenizer, task_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    report = run_harness(model, tokenizer, ["tiny_choice"], task_folder=task_folder)

    def score(question: str, choice: str) -> float:
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, choice))
        ids = [tokenizer.bos_token_id, *prompt, *answer]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(scores[len(ids) - len(answer) + at - 1, token]) for at, token in enumerate(answer))

    right = [
        max((0, 1), key=lambda at, row=row: score(row["question"], row["choices"][at])) == row["answer"]
        for row in QUESTIONS
    ]
    assert report.metrics == {"tiny_choice/acc": pytest.approx(sum(right) / len(right))}
    assert set(report.errors) == {"tiny_choice/acc"}


@pytest.mark.slow
def test_unknown_tasks_are_named(model, tokenizer, task_folder: Path):
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match=r"no task 'tiny_choise': did you mean tiny_choice"):
        run_harness(model, tokenizer, ["tiny_choise"], task_folder=task_folder)


def test_no_task_is_an_error():
    with pytest.raises(ConfigError, match="at least one"):
        run_harness(None, None, [])


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"aligntune\[harness\]"):
        run_harness(None, None, ["hellaswag"])


def test_results_by_name():
    scores = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.01,
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
    }
    report = _report({"results": {"gsm8k": scores}})
    assert report.metrics == {"gsm8k/exact_match,strict-match": 0.25, "gsm8k/acc": 0.5}
    assert report.errors == {"gsm8k/exact_match,strict-match": 0.01}
