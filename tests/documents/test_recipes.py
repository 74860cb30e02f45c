"""Every recipe of the repository trains: its own settings, with a tiny model, tiny data and small sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from aligntune.api import create_trainer
from aligntune.config.load import read_yaml
from aligntune.config.resolve import resolve

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = {
    "per_device_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1, "num_generations": 4,
    "rollout_batch_size": 4, "max_completion_length": 6, "response_length": 6, "overlong_buffer": 3, "eval_interval": 2,
    "save_interval": 2, "dpo_zero_shot_max_samples": 1,
    "max_resample_batches": 2, "meta_iterations": 1, "N": 2, "T": 1, "eval_max_tokens": 6,
}  # fmt: skip
"""What makes a run tiny; a recipe gets those that it sets itself."""
MOST = {"dpo": {"max_steps": 2, "max_target_length": 6}}
"""What a run gets whether its recipe sets it or not."""
WORDS = tiny.WORDS


def chosen(at: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"say {WORDS[at]}"}, {"role": "assistant", "content": WORDS[at]}]


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "openai/gsm8k": lambda at: {"question": f"{at} + 1", "answer": f"#### {at + 1}"},
    "open-r1/DAPO-Math-17k-Processed": lambda at: {"prompt": f"{at} + 1", "solution": str(at + 1)},
    "trl-lib/tldr": lambda at: {"prompt": f"{at} + 1 TL;DR:", "completion": f" {at + 1}"},
    "trl-lib/ultrafeedback_binarized": lambda at: {"chosen": chosen(at), "rejected": [*chosen(at)[:1], *chosen(at + 1)[1:]]},
    "text_classification": lambda at: {"text": f"{WORDS[at]} cat", "label": at % 2},
    "token_classification": lambda at: {"tokens": ["Ann", WORDS[at]], "ner_tags": ["B-PER", "O"]},
    "sft": lambda at: {"messages": chosen(at)},
}  # fmt: skip
"""A row in the columns of each data set that recipes name; else of each task, or algorithm."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    tiny.write_model(folder / "model")
    config = tiny.model(seed=1).config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    tiny.tokenizer().save_pretrained(folder / "reward")
    return folder


def tiny_run(recipe: dict[str, Any], models: Path, folder: Path) -> dict[str, Any]:
    """The recipe with another model, data and sizes, two steps long."""
    dataset = recipe["dataset"]
    kinds = (dataset["name"], dataset.get("task_type"), recipe["algorithm"])
    kind = next((kind for kind in kinds if kind in ROWS), None)
    assert kind is not None, f"add a row in the columns of {dataset['name']} to ROWS"
    data = tiny.write_rows(folder / "rows.jsonl", [ROWS[kind](at) for at in range(8)])
    local = {"name": str(data), "split": "train"}
    kept = {key: value for key, value in dataset.items() if key not in ("name", "split", "config_name", "subset")}
    has_eval = "eval_split" in recipe or "eval_dataset" in recipe
    model = recipe["model"] | {"name_or_path": str(models / "model"), "precision": "fp32"}
    for name in {"reward_model_name", "reward_path"} & set(model):
        model[name] = str(models / "reward")
    small = {name: value for name, value in SMALL.items() if name in recipe["train"]}
    made = {name: value for name, value in recipe.items() if name not in ("eval_split", "eval_dataset", "launch")}
    made |= {
        "model": model, "dataset": kept | local, "train": recipe["train"] | small | MOST.get(recipe["algorithm"], {"max_steps": 2}),
        "logging": recipe.get("logging", {}) | {"output_dir": str(folder / "out"), "loggers": "none"},
    }  # fmt: skip
    return made | ({"eval_dataset": kept | local | {"max_samples": 4}} if has_eval else {})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(path: Path, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe, _ = read_yaml(path)
    written = resolve(path).config
    session = create_trainer(tiny_run(recipe, models, tmp_path))
    with caplog.at_level(logging.WARNING, "aligntune"):
        metrics = session.train()
    assert session.trainer.state.global_step == 2
    if session.eval_rows is not None:
        assert [name for name in metrics if name.startswith("eval_")]
    assert (session.directory.model / "tokenizer.json").exists()
    if hasattr(session, "engine"):  # online: no recipe biases its ratio or defeats its algorithm
        assert written.train.top_p == 1.0
        assert session.spec.advice(written.train) == []


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10
