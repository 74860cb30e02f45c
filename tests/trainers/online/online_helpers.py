"""What the tests of online RL share: a reward, a reward model, and reading a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import tiny
from comparing import without_timing


def digits(completion: str) -> float:
    """Share of characters that are digits; 10 of 259 tokens are."""
    return sum(character.isdigit() for character in completion) / max(1, len(completion))


def write_reward_model(folder: Path, seed: int = 1) -> Path:
    """A random Llama with one output."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=512, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The metrics of a run, without what measures the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_timing(row) for row in rows if row["split"] == split]


def trained(session: Any) -> list[dict[str, Any]]:
    session.train(overwrite=True)
    return lines(session.directory.path)
