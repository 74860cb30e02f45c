"""Every recipe of online RL resolves without a warning, and runs a step on a tiny model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from aligntune.api import create_trainer
from aligntune.config.resolve import resolve

RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = ("ppo", "grpo", "grpo_lora", "dapo", "dr_grpo", "gspo")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name: str, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    resolved = resolve(recipe).config
    rows = [{"question": f"{at} + 1", "answer": f"#### {at + 1}", "prompt": f"{at} + 1"} for at in range(8)]
    if name != "ppo":
        rows = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    recipe["model"] |= {"name_or_path": str(files / "model"), "precision": "fp32"}
    if name == "ppo":
        recipe["model"]["reward_model_name"] = str(files / "reward")
    recipe["dataset"] = {"name": str(data)} | ({"task_type": "text"} if name == "ppo" else {})
    recipe |= {"eval_split": None, "eval_dataset": {"name": str(data), "max_samples": 2}}
    small = {"max_steps": 1, "max_completion_length": 6, "per_device_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 1,
             "rollout_batch_size": 4, "eval_interval": 1, "overlong_buffer": 3, "response_length": 6}  # fmt: skip
    recipe["train"] |= {key: value for key, value in small.items() if key in {*recipe["train"], "max_steps"}}
    recipe["logging"] = {"output_dir": str(tmp_path / "out"), "loggers": "none"}
    session = create_trainer({key: value for key, value in recipe.items() if value is not None})
    with caplog.at_level(logging.WARNING, "aligntune"):
        metrics = session.train()
    assert "eval_reward" in metrics
    assert resolved.train.top_p == 1.0  # no recipe biases its ratio
    assert session.spec.advice(resolved.train) == []
