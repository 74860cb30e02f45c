"""Classification from files to predictions: learning, saving, metrics held to scikit-learn and seqeval, bad input."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

import tiny
from aligntune.api import create_sft_trainer, evaluate
from aligntune.errors import ConfigError, DataError, ModelError
from aligntune.models.heads import saved_head
from aligntune.models.use import load_for_answers

PEOPLE = {"Ann": "B-PER", "Bob": "B-PER", "Rome": "B-LOC"}


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    """The class is one of the words, at a random place: a quarter of guesses would be right."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(["cat", "dog", "sun", "moon"])
        words = [draw.choice(tiny.WORDS[:6]) for _ in range(3)]
        words.insert(draw.randrange(4), label)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Names among other words; "Ann" is always followed by a second name."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens: list[str] = []
        tags: list[str] = []
        for _ in range(4):
            word = draw.choice([*tiny.WORDS[:6], *PEOPLE])
            tokens.append(word)
            tags.append(PEOPLE.get(word, "O"))
            if word == "Ann":
                tokens.append("Lee")
                tags.append("I-PER")
        rows.append({"tokens": tokens, "ner_tags": tags})
    return rows


ROWS = {"text_classification": texts, "token_classification": sentences}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify")
    tiny.write_model(folder / "model")
    for task, make in ROWS.items():
        tiny.write_rows(folder / f"{task}.jsonl", make(200, 0))
        tiny.write_rows(folder / f"{task}_eval.jsonl", make(40, 1))
    return folder


def session(root: Path, task: str, out: Path, **settings: Any) -> Any:
    common = {
        "dataset": {"task_type": task}, "eval_dataset": {"name": str(root / f"{task}_eval.jsonl")}, "precision": "fp32",
        "gradient_checkpointing": False, "per_device_batch_size": 8, "max_steps": 60, "learning_rate": 5e-3, "eval_interval": 60,
        "output_dir": str(out), "loggers": "none", "log_level": "ERROR", **({"lora_dropout": 0.0} if settings.get("peft_enabled") else {}),
    }  # fmt: skip
    return create_sft_trainer(str(root / "model"), str(root / f"{task}.jsonl"), **(common | settings))


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(("task", "metric"), [("text_classification", "accuracy"), ("token_classification", "f1")])
def test_learns_saves_and_predicts_the_same_again(root: Path, tmp_path: Path, task: str, metric: str, peft: bool) -> None:  # fmt: skip
    run = session(root, task, tmp_path, peft_enabled=peft, metric_for_best_model=metric, max_steps=80)
    found = run.train()
    assert found[f"eval_{metric}"] > 0.8
    saved = evaluate(str(tmp_path), str(root / f"{task}_eval.jsonl"), precision="fp32")
    for name, value in saved.metrics.items():
        assert value == pytest.approx(found[f"eval_{name}"], abs=1e-9)
    rows = ROWS[task](40, 1)
    said = run.predict([row["text"] if "text" in row else row["tokens"] for row in rows])
    for record, live in zip(saved.predictions, said, strict=True):
        kept = [record["probability"]] if "text" in rows[0] else [span["probability"] for span in record["spans"]]
        here = [live["probability"]] if "text" in rows[0] else [span["probability"] for span in live]
        assert kept == pytest.approx(here, abs=1e-5)
    titles = {json.loads(line)["title"] for line in (tmp_path / "sections.jsonl").read_text().splitlines() if '"title"' in line}  # fmt: skip
    assert {"Scores by class", "Confusion matrix"} <= titles
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 80}


def test_metrics_are_those_of_scikit_learn(root: Path, tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    run = session(root, "text_classification", tmp_path, max_steps=12)
    run.train()
    found = evaluate(str(tmp_path), str(root / "text_classification_eval.jsonl"), precision="fp32")
    wanted = [row["reference"] for row in found.predictions]
    said = [row["prediction"] for row in found.predictions]
    assert 0 < found.metrics["accuracy"] < 1
    assert found.metrics["accuracy"] == pytest.approx(sklearn.accuracy_score(wanted, said), abs=1e-9)
    for average in ("macro", "weighted"):
        other = sklearn.f1_score(wanted, said, average=average, zero_division=0)
        assert found.metrics[f"f1_{average}"] == pytest.approx(other, abs=1e-9)
    assert found.metrics["matthews_correlation"] == pytest.approx(sklearn.matthews_corrcoef(wanted, said), abs=1e-9)


def test_entity_metrics_are_those_of_seqeval(root: Path, tmp_path: Path) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    run = session(root, "token_classification", tmp_path, max_steps=14)
    run.train()
    found = evaluate(str(tmp_path), str(root / "token_classification_eval.jsonl"), precision="fp32")
    wanted = [row["reference"] for row in found.predictions]
    said = [row["prediction"] for row in found.predictions]
    assert found.metrics["precision"] == pytest.approx(seqeval.precision_score(wanted, said), abs=1e-9)
    assert found.metrics["recall"] == pytest.approx(seqeval.recall_score(wanted, said), abs=1e-9)
    assert found.metrics["f1"] == pytest.approx(seqeval.f1_score(wanted, said), abs=1e-9)


def test_evaluation_loss_does_not_depend_on_batches(root: Path, tmp_path: Path) -> None:
    losses = [
        session(root, "token_classification", tmp_path, per_device_batch_size=size).evaluate()["eval_loss"]
        for size in (1, 3, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_label_smoothing_by_hand(root: Path, tmp_path: Path) -> None:
    run = session(root, "text_classification", tmp_path, label_smoothing_factor=0.3)
    trainer = run.build_trainer()
    batch = run.eval_rows.select(range(1))[0]
    inputs = {
        "input_ids": torch.tensor([batch["input_ids"]]),
        "attention_mask": torch.ones(1, len(batch["input_ids"])),
        "labels": torch.tensor([batch["labels"]]),
    }
    run.model.train()
    loss = float(trainer.compute_loss(run.model, inputs))
    logp = run.model(inputs["input_ids"], inputs["attention_mask"]).logits[0].log_softmax(-1)
    assert loss == pytest.approx(float(-0.7 * logp[batch["labels"]] - 0.3 * logp.mean()), abs=1e-5)


def test_custom_metrics_and_labels_in_the_saved_config(root: Path, tmp_path: Path) -> None:
    run = session(root, "text_classification", tmp_path, max_steps=2, custom_metrics=[hits], num_labels=6)
    assert run.train()["eval_hits"] == run.metrics["eval_accuracy"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "moon", "3": "sun", "4": "LABEL_4", "5": "LABEL_5"}
    assert config["pad_token_id"] == run.tokenizer.pad_token_id


def hits(predictions: list[str], references: list[str]) -> dict[str, float]:
    return {"hits": sum(map(str.__eq__, predictions, references)) / len(references)}


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True}, {"padding_free": True}, {"completion_only_loss": True}, {"assistant_only_loss": True},
        {"loss_type": "dft"}, {"compute_rouge": True}, {"max_new_tokens": 4}, {"system_prompt": "be"}, {"streaming": True},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_that_cannot_act_are_refused(root: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        session(root, "text_classification", tmp_path, **settings)


@pytest.mark.parametrize(
    ("task", "rows", "settings", "said"),
    [
        ("text_classification", [{"text": "a", "label": "x"}] * 3, {}, "one class only"),
        ("text_classification", [{"text": "a", "label": at} for at in (0, 1, 7)], {"num_labels": 3}, "outside"),
        ("text_classification", [{"text": "a", "label": None}, {"text": "b", "label": "x"}], {}, "label"),
        (
            "token_classification",
            [{"tokens": ["a", "b"], "ner_tags": ["O"]}, {"tokens": ["a"], "ner_tags": ["B-X"]}],
            {},
            "2 tokens but 1 tags",
        ),
        ("token_classification", [{"words": ["a"], "ner_tags": ["O"]}], {}, "columns"),
    ],
)
def test_bad_labels(root: Path, tmp_path: Path, task: str, rows: Any, settings: Any, said: str) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    run = create_sft_trainer(
        str(root / "model"), str(data), task_type=task, output_dir=str(tmp_path / "out"), loggers="none", **settings
    )
    with pytest.raises(DataError, match=said):
        run.train()


def test_a_class_that_training_never_saw(root: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "eval.jsonl", [{"text": "red", "label": "fish"}])
    with pytest.raises(DataError, match="fish"):
        session(root, "text_classification", tmp_path / "out", eval_dataset={"name": str(data)}).train()


@pytest.mark.parametrize("task", list(ROWS))
def test_an_adapter_of_other_classes_or_another_task_gets_a_new_head(root: Path, tmp_path: Path, task: str) -> None:
    """As a whole classifier does; what the adapter learnt below the head stays."""
    first = session(root, "text_classification", tmp_path / "one", peft_enabled=True, max_steps=1)
    first.train()
    rows = [{**row, "label": "x" if row["label"] == "cat" else "y"} for row in texts(16, 0)]
    other = tiny.write_rows(tmp_path / "rows.jsonl", rows if task == "text_classification" else sentences(16, 0))
    settings = {
        "model": {"name_or_path": str(tmp_path / "one" / "model")},
        "dataset": {"name": str(other), "task_type": task},
    }
    again = create_sft_trainer(
        **settings, eval_dataset=None, precision="fp32", output_dir=str(tmp_path / "two"), loggers="none"
    )
    assert again.model.config.num_labels == len(again.labels.names)
    expected = first.model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(again.model.model.layers[0].self_attn.q_proj.weight, expected)


@pytest.mark.parametrize("task", list(ROWS))
def test_a_checkpoint_of_an_adapter_is_the_classifier_of_its_step(root: Path, tmp_path: Path, task: str) -> None:
    run = session(root, task, tmp_path / "out", peft_enabled=True, max_steps=2, save_interval=2, eval_interval=2)
    run.train()
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    rows = str(root / f"{task}_eval.jsonl")
    found = evaluate(str(checkpoint), rows, precision="fp32")
    assert found.task == task
    assert found.metrics["accuracy"] == pytest.approx(run.metrics["eval_accuracy"])
    (checkpoint / "labels.json").unlink()  # as other programs write it
    names = saved_head(str(checkpoint)).names
    assert names == tuple(f"LABEL_{place}" for place in range(len(run.labels.names)))
    with pytest.raises(ModelError, match="is a classifier"):
        load_for_answers(str(checkpoint))


def test_an_unknown_best_metric(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"acuracy.*did you mean eval_accuracy"):
        session(root, "text_classification", tmp_path, metric_for_best_model="eval_acuracy").train()


def test_evaluation_rows_that_number_the_classes_otherwise_are_read_by_name(root: Path, tmp_path: Path) -> None:
    def rows(name: str, names: list[str]) -> str:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        columns = {"text": ["cat", "dog", "dog"], "label": [names.index(each) for each in ("cat", "dog", "dog")]}
        Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    found = create_sft_trainer(
        str(root / "model"), rows("train", ["cat", "dog"]), dataset={"task_type": "text_classification"}, output_dir=str(tmp_path / "out"),
        eval_dataset=rows("eval", ["dog", "cat"]), loggers="none",
    )  # fmt: skip
    assert list(found.train_rows["labels"]) == list(found.eval_rows["labels"]) == [0, 1, 1]
    assert {
        found._record(each, {"label": "cat"})["reference"] for each in found._sample_examples if each.text == "cat"
    } == {"cat"}
