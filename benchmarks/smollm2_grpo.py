"""GRPO on a real pretrained model: SmolLM2-135M-Instruct learns sums of reasoning-gym by reward alone, on one GPU.

    python benchmarks/smollm2_grpo.py prompts DATA                   (needs the extra `reasoning-gym`)
    python benchmarks/smollm2_grpo.py train MODEL DATA OUT [--steps 160]

`prompts` writes train.jsonl and held_out.jsonl: reasoning-gym's chain_sum, two terms of one or two digits, no question in both.
`train` runs the config below and writes smollm2_grpo.json (reward by step, held-out greedy accuracy by evaluation), a
table and a plot. The reward is 1 when the last number of the answer is right, nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from shapes import versions

from aligntune.reporting.palette import standalone
from aligntune.reporting.svg import Line, line_chart

HELD_OUT = 256


def write_prompts(folder: Path) -> None:
    import reasoning_gym

    folder.mkdir(parents=True, exist_ok=True)
    shape = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    rows = {}
    for entry in reasoning_gym.create_dataset("chain_sum", size=4000, seed=0, **shape):
        rows[entry["question"]] = {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "answer": entry["answer"],
        }
    unique = list(rows.values())
    for name, part in (("held_out", unique[:HELD_OUT]), ("train", unique[HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    print(f"{len(unique) - HELD_OUT} prompts, {HELD_OUT} held out")


def config(model: Path, data: Path, output: Path, steps: int, prompts: int) -> dict[str, Any]:
    return {
        "algorithm": "grpo", "backend": "native",
        "model": {"name_or_path": str(model), "precision": "bf16", "use_peft": False, "max_seq_length": 128},
        "dataset": {"name": str(data / "train.jsonl")},
        "eval_dataset": {"name": str(data / "held_out.jsonl")},
        "rewards": [{"type": "gsm8k", "params": {"strict": False}}],
        "train": {
            "max_steps": steps, "per_device_batch_size": 8 * prompts, "num_generations": 8, "learning_rate": 5e-6, "lr_scheduler": "constant",
            "warmup_steps": 5, "max_completion_length": 24, "temperature": 1.0, "top_p": 1.0, "kl_coef": 0.0, "mask_truncated_completions": False,
            "eval_strategy": "steps", "eval_interval": 10, "per_device_eval_batch_size": 256, "save_strategy": "no", "logging_steps": 1,
            "load_best_model_at_end": False,
        },
        "logging": {"output_dir": str(output), "loggers": "none"},
    }  # fmt: skip


def train(model: Path, data: Path, out: Path, steps: int, prompts: int) -> None:
    from aligntune.api import create_trainer

    out.mkdir(parents=True, exist_ok=True)
    session = create_trainer(config(model, data, out / "run", steps, prompts))
    started = time.monotonic()
    session.train(overwrite=True)
    seconds = time.monotonic() - started
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    names = ("reward", "entropy", "perf/rollout_tokens_per_second", "perf/update_seconds", "sampler_mismatch")
    by_step = [
        {"step": row["step"], **{name: row[name] for name in names if name in row}}
        for row in rows
        if row["split"] == "train"
    ]
    evaluations = [row for row in rows if row["split"] == "eval"]
    accuracy = "pass@1" if "pass@1" in evaluations[0] else "reward"
    held_out = [{"step": row["step"], "accuracy": row[accuracy]} for row in evaluations]
    record = {"seconds": round(seconds, 1), "steps": steps, "completions_a_step": 8 * prompts, "train": by_step, "held_out": held_out, **versions()}  # fmt: skip
    (out / "smollm2_grpo.json").write_text(json.dumps(record) + "\n")
    reward = Line(
        "reward of samples (temperature 1)", [row["step"] for row in by_step], [row.get("reward") for row in by_step]
    )
    exact = Line(
        f"greedy accuracy on {HELD_OUT} held-out prompts",
        [row["step"] for row in held_out],
        [row["accuracy"] for row in held_out],
    )
    (out / "smollm2_grpo.svg").write_text(standalone(line_chart([reward, exact], title="GRPO on SmolLM2-135M-Instruct: sums of two numbers", x_label="step")))  # fmt: skip
    table = "\n".join(f"| {row['step']} | {row['accuracy']:.3f} |" for row in held_out)
    (out / "smollm2_grpo.md").write_text(f"Greedy accuracy on {HELD_OUT} held-out prompts; {seconds:.0f} s for {steps} steps of {8 * prompts} completions ({versions()['card']}).\n\n| step | accuracy |\n|---|---|\n{table}\n")  # fmt: skip
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prompts").add_argument("data", type=Path)
    training = commands.add_parser("train")
    for name in ("model", "data", "out"):
        training.add_argument(name, type=Path)
    training.add_argument("--steps", type=int, default=160)
    training.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    if args.command == "prompts":
        write_prompts(args.data)
    else:
        train(args.model, args.data, args.out, args.steps, args.prompts)


if __name__ == "__main__":
    main()
