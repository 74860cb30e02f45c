"""Tiny runs for the tests of several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny

ONLINE = {
    "grpo": {"num_generations": 2},
    "dapo": {"num_generations": 2, "max_resample_batches": 3},
    "ppo": {"whiten_rewards": True, "num_ppo_epochs": 2, "max_steps": 5},  # three rollouts, two of them seen twice
}
"""Settings of each online algorithm beside the common ones."""


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 24 chats to train on and 7 to evaluate on (7 does not divide by the batch), pairs and prompts;
    as many texts of three classes."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.chats(24))
    tiny.write_rows(folder / "held_out.jsonl", tiny.chats(7, start=40))
    words = tiny.WORDS
    classes = [
        {"text": f"say {words[i % 16]} {words[i * 3 % 16]}" * (1 + i % 3), "label": "abc"[i % 3]} for i in range(31)
    ]
    tiny.write_rows(folder / "classes.jsonl", classes[:24])
    tiny.write_rows(folder / "held_out_classes.jsonl", classes[24:])
    pairs = [
        {"prompt": f"say {words[i % 16]}", "chosen": words[i % 16] * (1 + i % 3), "rejected": words[(i * 5 + 3) % 16]}
        for i in range(24)
    ]
    tiny.write_rows(folder / "pairs.jsonl", pairs)
    tiny.write_rows(folder / "prompts.jsonl", [{"prompt": f"say {i} {words[i % 16]}"} for i in range(24)])
    return folder


@pytest.fixture(scope="session")
def rl_config(parts: Path) -> Callable[..., dict[str, Any]]:
    """`rl_config(algorithm, output_dir, world, backend, **changes of train)`: four pairs or completions a step, over all
    processes."""

    def make(algorithm: str, output: Path, world: int = 1, backend: str = "native", **changes: Any) -> dict[str, Any]:
        rows = "pairs.jsonl" if algorithm == "dpo" else "prompts.jsonl"
        train: dict[str, Any] = {
            "per_device_batch_size": 4 // world, "max_steps": 3, "learning_rate": 1e-3, "lr_scheduler": "constant",
            "logging_steps": 1, "group_by_length": False, "save_strategy": "no",
        }  # fmt: skip
        config: dict[str, Any] = {
            "algorithm": algorithm, "backend": backend, "fallback": False, "dataset": {"name": str(parts / rows)},
            "model": {"name_or_path": str(parts / "model"), "precision": "fp32", "max_seq_length": 128, "use_peft": False},
            "logging": {"output_dir": str(output), "loggers": "none"},
        }  # fmt: skip
        if algorithm in ONLINE:
            train |= {"max_completion_length": 12, "max_prompt_length": 64, "temperature": 1.0, "top_p": 1.0}
            train |= ONLINE[algorithm]
            config["rewards"] = [{"type": "length"}]
        return config | {"train": train | changes}

    return make


@pytest.fixture(scope="session")
def sft_config(parts: Path) -> Callable[..., dict[str, Any]]:
    """`sft_config(output_dir, world, backend, model={..}, **changes of train)`: four rows a step, over all processes."""

    def make(
        output: Path, world: int = 1, backend: str = "native", model: dict[str, Any] | None = None, **train: Any
    ) -> dict[str, Any]:
        return {
            "algorithm": "sft", "backend": backend, "fallback": False,
            "model": {"name_or_path": str(parts / "model"), "precision": "fp32", "max_seq_length": 128} | (model or {}),
            "dataset": {"name": str(parts / "rows.jsonl")},
            "eval_dataset": {"name": str(parts / "held_out.jsonl")},
            "train": {
                "per_device_batch_size": 4 // world, "gradient_accumulation_steps": 1, "max_steps": 4, "learning_rate": 1e-2,
                "eval_interval": 2, "save_interval": 2, "lr_scheduler": "constant", "warmup_ratio": 0.0, **train,
            },
            "evaluation": {"max_new_tokens": 4, "compute_rouge": False, "compute_bleu": False},
            "logging": {"output_dir": str(output), "log_interval": 1, "loggers": "none"},
        }  # fmt: skip

    return make
