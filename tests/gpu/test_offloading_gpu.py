"""Activations in CPU memory on a real GPU: the losses of a run that keeps them, at a lower peak."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from aligntune.core.backend_factory import create_sft_trainer

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "max_position_embeddings": 2048}


def trained(folder: Path, name: str, **settings: Any) -> tuple[list[float], int]:
    """Losses, and the peak of allocated bytes over the training steps."""
    gc.collect()
    torch.cuda.empty_cache()
    session = create_sft_trainer(
        model_name=folder / "model", dataset_name=folder / "train.jsonl", output_dir=folder / name, precision="bf16", batch_size=8,
        max_seq_length=2048, learning_rate=1e-3, max_steps=6, log_interval=1, save_strategy="no", loggers="none", backend="native",
        compile=False, evaluation={"max_new_tokens": 4}, task_type="text_generation", **settings,
    )  # fmt: skip
    session.train()
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"], torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(("checkpointing", "share"), [(False, 0.6), (True, 1.0)])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_same_losses_at_a_lower_peak(tmp_path: Path, checkpointing: bool, share: float, adapter: bool) -> None:
    """16 thousand tokens a step: a gigabyte of activations where layers are not computed again, else 96 MB of their inputs."""
    tiny.write_model(tmp_path / "model", **SHAPE)
    tiny.write_rows(tmp_path / "train.jsonl", [{"text": f"{word} " * (2000 // (len(word) + 1))} for word in tiny.WORDS])
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    if adapter:
        settings |= {"use_peft": True, "lora_dropout": 0.0}
    torch.cuda.reset_peak_memory_stats()
    kept, most = trained(tmp_path, "kept", **settings)
    torch.cuda.reset_peak_memory_stats()
    moved, less = trained(tmp_path, "moved", **settings, activation_offloading=True)
    assert len(moved) == 6
    assert moved == pytest.approx(kept, rel=2e-3)
    assert less < share * most
