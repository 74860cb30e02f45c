"""Online RL on a GPU: bf16, the graph engine, and the same laws as on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from aligntune.core.backend_factory import create_rl_trainer

pytestmark = pytest.mark.gpu


def digits(completion: str) -> float:
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dapo"])
@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run(tmp_path: Path, algorithm: str, use_peft: bool, compiled: bool) -> None:
    tiny.write_model(tmp_path / "model", hidden_size=64, num_attention_heads=4)
    tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}", "answer": word} for word in tiny.WORDS])
    settings: dict[str, Any] = {} if algorithm == "ppo" else {"num_generations": 8}
    if compiled:
        torch._dynamo.reset()
        settings |= {"compile": True, "lora_dropout": 0.0} if use_peft else {"compile": True}
    session = create_rl_trainer(
        tmp_path / "model", tmp_path / "prompts.jsonl", algorithm, backend="native", reward_functions=[digits], use_peft=use_peft,
        batch_size=32, max_steps=40, learning_rate=1e-2, lr_scheduler="constant", logging_steps=1, max_completion_length=8, temperature=1.0,
        top_p=1.0, loggers="none", kl_coef=0.01, mask_truncated_completions=False, output_dir=tmp_path / "out",
        eval_dataset=str(tmp_path / "prompts.jsonl"), eval_strategy="steps", eval_interval=20, **settings,
    )  # fmt: skip
    session.train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert train[0]["ratio_max"] == pytest.approx(1, abs=0.05)
    assert train[0]["sampler_mismatch"] < 0.02
    rewards = [row["reward"] for row in train if "reward" in row]
    kl = [abs(row["kl"]) for row in train if "kl" in row]
    assert kl[-1] > kl[0] + 1e-3
    assert use_peft or rewards[-1] > rewards[0] + 0.2  # a random base learns little through its attention alone
    assert [row["step"] for row in rows if row["split"] == "eval"] == [0, 20, 40]
