"""`aligntune quickstart`: fine-tune the embedded model, align it, and say how good it was at each stage."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from aligntune.api import create_trainer
from aligntune.quickstart import task

HERE = Path(__file__).parent
BASE = HERE / "base"


def sft_config(folder: Path, output: Path) -> dict[str, Any]:
    """Supervised fine-tuning of the base on 4,000 conversations, three in ten of which answer carelessly."""
    return {
        "algorithm": "sft",
        "model": {"name_or_path": str(BASE), "precision": "fp32", "max_seq_length": 64, "gradient_checkpointing": False},
        "dataset": {"name": str(folder / "train.jsonl")},
        "eval_dataset": {"name": str(folder / "held_out.jsonl"), "max_samples": 64},
        "train": {
            "max_steps": 240, "per_device_batch_size": 32, "learning_rate": 1e-3, "warmup_ratio": 0.1, "eval_interval": 60, "save_interval": 60,
        },
        "evaluation": {"compute_rouge": False, "compute_bleu": False, "max_new_tokens": 8, "custom_metrics": ["aligntune.quickstart.run:exact"]},
        "logging": {"output_dir": str(output), "log_interval": 20},
    }  # fmt: skip


def grpo_config(folder: Path, output: Path, start: Path) -> dict[str, Any]:
    """GRPO from the fine-tuned model; the reward is the share of words in their place."""
    return {
        "algorithm": "grpo",
        "model": {"name_or_path": str(start), "precision": "fp32", "use_peft": False, "max_seq_length": 64},
        "dataset": {"name": str(folder / "prompts.jsonl")},
        "eval_dataset": {"name": str(folder / "held_out.jsonl"), "max_samples": 64},
        "rewards": [{"type": "aligntune.quickstart.run:right"}, {"type": "aligntune.quickstart.task:in_place"}],
        "train": {
            "max_steps": 60, "per_device_batch_size": 64, "num_generations": 8, "learning_rate": 5e-4, "max_completion_length": 8,
            "temperature": 1.0, "top_p": 1.0, "kl_coef": 0.0, "eval_strategy": "steps", "eval_interval": 20, "save_interval": 60, "logging_steps": 10,
            "lr_scheduler": "cosine",
        },
        "logging": {"output_dir": str(output)},
    }  # fmt: skip


def quickstart(output: Path, *, overwrite: bool = True) -> dict[str, float]:
    """Run both stages under `output`; returns the accuracy on held-out lists of the base, after SFT and after GRPO."""
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    task.write(output, train=4000)
    print(f"The task: say words backwards. The model: {BASE.name}, 0.5 million parameters, that has never seen a chat.")
    sft = create_trainer(sft_config(output, output / "sft"))
    found = {"base": measured(sft)}
    sft.train(overwrite=overwrite)
    found["SFT"] = measured(sft)
    write_prompts(output / "prompts.jsonl")
    grpo = create_trainer(grpo_config(output, output / "grpo", sft.directory.model))
    grpo.train(overwrite=overwrite)
    found["GRPO"] = measured(grpo)
    stages = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    print(f"\nRight answers to {len(task.held_out())} held-out lists: {stages} ({time.monotonic() - started:.0f} s)")
    for session in (sft, grpo):
        print(f"report: {session.directory.report}")
    print(f"try:    aligntune chat {output / 'grpo'}    and ask: {task.question(['cat', 'red', 'blue'])}")
    return found


def measured(session: Any) -> float:
    """Accuracy of a session's model on the held-out lists, greedy."""
    words = task.held_out()
    return task.accuracy(session.predict([task.question(item) for item in words], max_new_tokens=8), words)


def write_prompts(path: Path) -> None:
    """Prompts for GRPO: other lists than those of SFT and of the evaluation, with the answer for the reward only."""
    exclude = frozenset(tuple(words) for words in task.held_out())
    rows = [
        {"prompt": row["prompt"], "answer": row["answer"]} for row in task.rows(task.lists(600, 2, exclude=exclude))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def right(completion: str, answer: str) -> float:
    """1 for the right answer, else 0."""
    return float(completion.split() == answer.split())


def exact(predictions: list[str], references: list[str], **columns: Any) -> dict[str, float]:
    """Share of answers that are right, word for word."""
    return {
        "exact": sum(said.split() == wanted.split() for said, wanted in zip(predictions, references)) / len(references)
    }
