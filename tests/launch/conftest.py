"""Tiny runs for the tests of several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 24 chats to train on and 7 to evaluate on (7 does not divide by the batch)."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.chats(24))
    tiny.write_rows(folder / "held_out.jsonl", tiny.chats(7, start=40))
    return folder


@pytest.fixture
def sft_config(parts: Path) -> Callable[..., dict[str, Any]]:
    """`sft_config(output_dir, world, **changes of train)`: four rows a step, over all processes."""

    def make(output: Path, world: int = 1, backend: str = "native", **train: Any) -> dict[str, Any]:
        return {
            "algorithm": "sft", "backend": backend, "fallback": False,
            "model": {"name_or_path": str(parts / "model"), "precision": "fp32", "max_seq_length": 128},
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
