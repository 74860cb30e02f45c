"""The same run on 1, 2, 4 and 8 GPUs of one host, by `launch:` alone: python benchmarks/several.py SHAPE STEPS TASK [TASK ...] [--counts 1 2 4 8] [--out FILE].

A TASK is one of
    sft-ddp, sft-fsdp2   full fine-tuning, packed rows of 2048, 8 a GPU
    sft-equal            sft-ddp at the global batch of one GPU: 8 rows together
    dpo-ddp              8 pairs a GPU
    grpo-ddp             64 completions of 256 tokens a GPU, rollouts on every GPU

Work grows with the number of GPUs (but for sft-equal), so that efficiency is the speed of n GPUs over n times that of one; the run on
one GPU has no launcher, and is one for all tasks of sft, whose compiled layers it has too. Tokens a second and memory (of the
fullest GPU, and of each) are those of the run's own log, the first steps left out. Losses of sft-equal are held against those of one GPU. On a
CPU: processes over gloo, DDP. `--parts DIR` keeps model and data; `--out` is also read, for runs on one GPU of an earlier call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

from arms import ended, parts, trained_rows
from shapes import SHAPES, report, text_lengths

from backends import write_parts

WARMUP = 6
TASKS = ("sft-ddp", "sft-fsdp2", "sft-equal", "dpo-ddp", "grpo-ddp")
ROWS = 8


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
        rows = ROWS // count if task == "sft-equal" else ROWS
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
    parser.add_argument("--parts", help="where model and data are kept, or were by an earlier call")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a run may take")
    parser.add_argument("--folder", help="(for this script itself) where model and data are")
    args = parser.parse_args()
    if args.folder:
        folder, task, count = Path(args.folder), args.tasks[0], args.counts[0]
        (folder / f"{task}-{count}.json").write_text(json.dumps(one(folder, task, count, args.steps)))
        return

    def write(folder: Path) -> None:
        write_parts(folder, args.shape, lengths=text_lengths(args.steps * ROWS * 12 * max(args.counts), 2048))

    alone = {(row["task"].split("-")[0], row["steps"]): row for row in rows_of(args.out) if row["gpus"] == 1 and row["shape"] == args.shape}  # fmt: skip
    with parts(args.parts, write) as folder:
        write_pairs(folder)
        base = [sys.executable, __file__, args.shape, str(args.steps)]
        runs = [(task, count) for count in args.counts for task in args.tasks if count > 1 or task == first_of_kind(task, args.tasks)]  # fmt: skip
        commands = {f"{task}-{count}": [*base, task, "--counts", str(count), "--folder", str(folder)] for task, count in runs}  # fmt: skip
        for arm, failure in ended(commands, folder, args.limit):
            task, _, count = arm.rpartition("-")
            found = {"failed": failure} if failure else json.loads((folder / f"{arm}.json").read_text())
            if by_process := re.search(r"peak memory by process: ([\d., ]+) GiB", (folder / f"{arm}.log").read_text()):
                found["peaks_gib"] = [float(peak) for peak in by_process[1].split(",")]
            key = (task.split("-")[0], args.steps)
            if count == "1" and not failure:
                alone[key] = found
            elif not failure and key in alone:
                found["efficiency"] = round(found["tokens_per_s"] / (int(count) * alone[key]["tokens_per_s"]), 3)
                if task == "sft-equal":
                    found["largest_loss_difference"] = round(max(abs(a - b) for a, b in zip(found["losses"], alone[key]["losses"], strict=True)), 4)  # fmt: skip
            report(args.out, benchmark="several", task=task, gpus=int(count), shape=args.shape, steps=args.steps, **found)  # fmt: skip


def first_of_kind(task: str, tasks: list[str]) -> str:
    return next(each for each in tasks if each.split("-")[0] == task.split("-")[0])


def rows_of(out: str | None) -> list[dict[str, Any]]:
    """What earlier calls found."""
    if out is None or not Path(out).exists():
        return []
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    return [row for row in rows if row["benchmark"] == "several" and "failed" not in row]


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
