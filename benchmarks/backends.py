"""The same run on Unsloth, TRL and native, side by side: python benchmarks/backends.py SHAPE STEPS TASK [TASK ...] [--out FILE].

A TASK is sft (full fine-tuning), lora (SFT with rank 16) or grpo (LoRA, the share of even tokens as reward, 8 completions of 32 tokens). Each
backend trains in a process of its own, one after another: TRL and native in one that this script starts, Unsloth in the
child of a parent that already holds transformers. Random weights, random texts of instruction-like lengths, padded batches
(the one layout that all three have), layers not compiled (20 steps do not earn it); tokens a second and memory are those of the run's own log lines, the first three steps left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import ended
from shapes import SHAPES, build_model, report, text_lengths

BACKENDS = ("unsloth", "trl", "native")
WARMUP = 3


def byte_tokenizer() -> Any:
    """A token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: at for at, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def write_parts(folder: Path, shape: str, lengths: Sequence[int] | None = None) -> None:
    """A model (stored in bfloat16, as published ones are), its byte tokenizer, texts (of `lengths` tokens) and prompts."""
    byte_tokenizer().save_pretrained(folder / "model")
    build_model(shape, "cpu").bfloat16().save_pretrained(folder / "model")
    rng = random.Random(0)
    texts = ["".join(rng.choice("abcdefgh ") for _ in range(length)) for length in lengths or text_lengths(512, 1024)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text[:64]}) + "\n" for text in texts))


def even(completion_ids: list[int]) -> float:
    """The share of even tokens: varies with random weights, whatever they decode to."""
    return sum(token % 2 == 0 for token in completion_ids) / len(completion_ids)


def config(folder: Path, task: str, backend: str, steps: int) -> dict[str, Any]:
    """The run; the same for each backend but for its name."""
    import torch

    precision = "bf16" if torch.cuda.is_available() else "fp32"
    logging: dict[str, Any] = {"output_dir": str(folder / f"{task}-{backend}"), "loggers": "none"}
    model: dict[str, Any] = {
        "name_or_path": str(folder / "model"),
        "precision": precision,
        "max_seq_length": 1024,
        "gradient_checkpointing": False,
        "compile": False,
    }
    train: dict[str, Any] = {
        "max_steps": steps,
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
    }
    run: dict[str, Any] = {"backend": backend, "fallback": False, "model": model, "train": train, "logging": logging}
    if task == "grpo":
        model |= {"use_peft": True, "lora_dropout": 0.0}
        train |= {"per_device_batch_size": 16, "num_generations": 8, "max_completion_length": 32, "temperature": 1.0, "top_p": 1.0, "logging_steps": 1, "save_strategy": "no", "kl_coef": 0.0, "group_by_length": False, "mask_truncated_completions": False}  # fmt: skip
        return run | {
            "algorithm": "grpo",
            "dataset": {"name": str(folder / "prompts.jsonl")},
            "rewards": [{"type": "backends:even"}],
        }
    model |= {"peft_enabled": True, "lora_dropout": 0.0} if task == "lora" else {"peft_enabled": False}
    train |= {"per_device_batch_size": 8, "gradient_accumulation_steps": 1, "warmup_ratio": 0.0}
    logging |= {"log_interval": 1, "save_strategy": "no"}
    return run | {"algorithm": "sft", "dataset": {"name": str(folder / "texts.jsonl"), "task_type": "text_generation"}, "evaluation": {"max_new_tokens": 4}}  # fmt: skip


def train(run: dict[str, Any]) -> None:
    """Train here, or for Unsloth in the child of this process, which holds transformers by then."""
    import transformers  # noqa: F401

    from aligntune.api import create_trainer

    create_trainer(run).train(overwrite=True)


def measured(run: dict[str, Any]) -> dict[str, Any]:
    """Losses and gradient norms of the first 20 steps, tokens a second (median after warm-up) and peak memory, from the run's own trail."""
    file = Path(run["logging"]["output_dir"]) / "metrics.jsonl"
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["split"] == "train"]
    speeds = sorted(row["tokens_per_second"] for row in rows[WARMUP:] if row.get("tokens_per_second"))
    rewards = {"rewards": [round(row["reward"], 4) for row in rows[:20]]} if "reward" in rows[0] else {}
    return rewards | {
        "losses": [round(row["loss"], 4) for row in rows[:20]],
        "grad_norms": [round(row["grad_norm"], 4) for row in rows[:20] if "grad_norm" in row],
        "tokens_per_s": round(speeds[len(speeds) // 2]) if speeds else None,
        "peak_gib": max((row["memory_gib"] for row in rows if "memory_gib" in row), default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("steps", type=int)
    parser.add_argument("tasks", nargs="+", choices=("sft", "lora", "grpo"))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--out")
    parser.add_argument("--limit", type=float, default=240, help="seconds that an arm may take")
    parser.add_argument("--one", help="(for this script itself) a run as JSON")
    args = parser.parse_args()
    if args.one:
        train(json.loads(args.one))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_parts(folder, args.shape)
        runs = {
            f"{task}-{backend}": config(folder, task, backend, args.steps)
            for task in args.tasks
            for backend in args.backends
        }
        base = [sys.executable, __file__, args.shape, str(args.steps)]
        commands = {name: [*base, name.split("-")[0], "--one", json.dumps(run)] for name, run in runs.items()}
        for name, failure in ended(commands, folder, args.limit):
            task, backend = name.split("-")
            found = {"failed": failure} if failure else measured(runs[name])
            report(args.out, benchmark="backends", task=task, backend=backend, shape=args.shape, steps=args.steps, **found)  # fmt: skip


if __name__ == "__main__":
    main()
