"""The same run on 1, 2, 4 and 8 GPUs of one host, by `launch:` alone: python benchmarks/several.py SHAPE STEPS TASK [TASK ...] [--counts 1 2 4 8] [--out FILE].

A TASK is one of
    sft-ddp, sft-fsdp2   full fine-tuning, packed rows of 2048, 8 a GPU
    sft-equal            sft-ddp at one global batch for all counts: its losses are those of one GPU
    dpo-ddp              8 pairs a GPU
    grpo-ddp             64 completions of 256 tokens a GPU, rollouts on every GPU

Work grows with the number of GPUs (but for sft-equal), so that efficiency is the speed of n GPUs over n times that of one. Tokens
a second and memory (of the fullest GPU) are those of the run's own log, the first steps left out. On a CPU: processes over gloo, DDP.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from arms import ended, trained_rows
from shapes import SHAPES, report, text_lengths

from backends import write_parts

WARMUP = 6
TASKS = ("sft-ddp", "sft-fsdp2", "sft-equal", "dpo-ddp", "grpo-ddp")
MOST = 8
"""GPUs whose rows are the global batch of sft-equal."""


def config(folder: Path, task: str, count: int, steps: int) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    kind, strategy = task.split("-")
    strategy = "fsdp2" if strategy == "fsdp2" else "ddp"
    run: dict[str, Any] = {
        "backend": "native", "fallback": False,
        "model": {"name_or_path": str(folder / "model"), "precision": "bf16" if cuda else "fp32", "gradient_checkpointing": False},
        "train": {"max_steps": steps, "learning_rate": 1e-5, "lr_scheduler": "constant", "per_device_batch_size": 8},
        "logging": {"output_dir": str(folder / f"{task}-{count}"), "loggers": "none"},
    }  # fmt: skip
    if count > 1:
        run["launch"] = {
            "launcher": "accelerate" if cuda else "torchrun",
            "strategy": strategy,
            "num_processes": count,
        }
    if kind == "sft":
        rows = 8 if strategy == "fsdp2" or task == "sft-ddp" else MOST // count
        run |= {"algorithm": "sft", "dataset": {"name": str(folder / "texts.jsonl"), "task_type": "text_generation"}, "evaluation": {"max_new_tokens": 2}}  # fmt: skip
        run["model"] |= {"max_seq_length": 2048, "compile": cuda}
        run["train"] |= {"packing": True, "warmup_ratio": 0.0, "per_device_batch_size": rows}
        run["logging"] |= {"log_interval": 1, "save_strategy": "no"}
        return run
    run["train"] |= {"logging_steps": 1, "save_strategy": "no", "group_by_length": False}
    run["model"] |= {"use_peft": False}
    if kind == "dpo":
        return run | {"algorithm": "dpo", "dataset": {"name": str(folder / "pairs.jsonl")}}
    run["train"] |= {"per_device_batch_size": 64, "num_generations": 8, "max_completion_length": 256, "temperature": 1.0, "top_p": 1.0, "kl_coef": 0.0, "mask_truncated_completions": False}  # fmt: skip
    return run | {"algorithm": "grpo", "dataset": {"name": str(folder / "prompts.jsonl")}, "rewards": [{"type": "backends:even"}]}  # fmt: skip


def one(folder: Path, task: str, count: int, steps: int) -> dict[str, Any]:
    from aligntune.api import create_trainer

    run = config(folder, task, count, steps)
    rows = trained_rows(create_trainer(run), Path(run["logging"]["output_dir"]))
    speeds = sorted(row["tokens_per_second"] for row in rows[min(WARMUP, len(rows) - 1) :])
    phases = {name: rows[-1][name] for name in ("perf/rollout_seconds", "perf/update_seconds") if name in rows[-1]}
    return phases | {
        "tokens_per_s": round(speeds[len(speeds) // 2]),
        "peak_gib": max((row["memory_gib"] for row in rows if row.get("memory_gib")), default=None),
        "losses": [round(row["loss"], 4) for row in rows[:20]],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("steps", type=int)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--out")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a run may take")
    parser.add_argument("--folder", help="(for this script itself) where model and data are")
    args = parser.parse_args()
    if args.folder:
        folder, task, count = Path(args.folder), args.tasks[0], args.counts[0]
        (folder / f"{task}-{count}.json").write_text(json.dumps(one(folder, task, count, args.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder, args.shape, lengths=text_lengths(args.steps * 8 * 12 * max(args.counts), 2048))
        write_pairs(folder)
        commands = {
            f"{task}-{count}": [sys.executable, __file__, args.shape, str(args.steps), task, "--counts", str(count), "--folder", name]
            for task in args.tasks
            for count in args.counts
        }  # fmt: skip
        single: dict[str, float] = {}
        for arm, failure in ended(commands, folder, args.limit):
            task, _, count = arm.rpartition("-")
            found = {"failed": failure} if failure else json.loads((folder / f"{arm}.json").read_text())
            if not failure:
                single.setdefault(task, found["tokens_per_s"] / int(count))
                found["efficiency"] = round(found["tokens_per_s"] / (int(count) * single[task]), 3)
            report(args.out, benchmark="several", task=task, gpus=int(count), shape=args.shape, steps=args.steps, **found)  # fmt: skip


def write_pairs(folder: Path) -> None:
    """The texts again, halved: a prompt, the rest of it, and the rest of another."""
    texts = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": text[:64], "chosen": text[64:512] or "a", "rejected": other[64:512] or "b"}
        for text, other in itertools.pairwise(texts)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
