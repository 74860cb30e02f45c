"""The settings of the classification tasks act: each is changed, and an effect is observed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from live.cases import Case, observed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    tiny.write_model(root / "model")
    rows: list[dict[str, Any]] = [
        {"text": word, "label": at % 2, "other_label": at % 3, "tokens": [word, "x"], "words": ["y", word, word], "others": ["z", word, "q"],
         "ner_tags": ["O", "B-A"], "tags": ["B-A", "O"], "three_tags": ["O", "B-A", "O"]}
        for at, word in enumerate(tiny.WORDS)
    ]  # fmt: skip
    tiny.write_rows(root / "rows.jsonl", rows)
    return root


def labels(session: Any) -> Any:
    return [row["labels"] for row in session.train_rows]


def tokens(session: Any) -> Any:
    return [list(row["input_ids"]) for row in session.train_rows]


def argument(name: str) -> Any:
    return lambda session: getattr(session.build_trainer().args, name)


def loss(session: Any) -> float:
    trainer = session.build_trainer()
    torch.manual_seed(0)
    trainer.model.train()
    return round(float(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).detach()), 6)


def pieces(session: Any) -> int:
    return len(next(iter(session.build_trainer().get_train_dataloader()))["pieces"])


TEXT = {"dataset.task_type": "text_classification"}
WORDS = {"dataset.task_type": "token_classification"}
EVAL = {"eval_dataset": {"name": "ROWS"}}

CASES = [
    Case("model.num_labels", 6, lambda s: len(s.labels.names), base=TEXT),
    Case("dataset.label_column", "other_label", labels, base=TEXT),
    Case("dataset.tokens_column", "words", tokens, base=WORDS | {"dataset.tags_column": "three_tags"}, against="others"),
    Case("dataset.tags_column", "tags", labels, base=WORDS),
    Case("train.label_smoothing_factor", 0.3, loss, base=TEXT),
    Case("train.eval_accumulation_steps", 2, argument("eval_accumulation_steps"), base=TEXT),
    Case("train.metric_for_best_model", "eval_f1_macro", argument("metric_for_best_model"), base=TEXT | EVAL),
    Case("train.per_device_batch_size", 3, argument("per_device_train_batch_size"), base=TEXT),
    Case("train.micro_batch_tokens", 4, pieces, base=TEXT | {"train.per_device_batch_size": 4}, against=100),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_setting_acts(case: Case, folder: Path, tmp_path: Path) -> None:
    rows = str(folder / "rows.jsonl")
    base = {name: {"name": rows} if value == {"name": "ROWS"} else value for name, value in case.base.items()}
    common = {
        "algorithm": "sft", "model.name_or_path": str(folder / "model"), "model.precision": "fp32", "dataset.name": rows,
        "logging.output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    before, after = observed(common, Case(case.path, case.value, case.observe, base, case.against))
    assert before != after
