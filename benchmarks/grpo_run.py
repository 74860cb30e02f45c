"""GRPO by whole trainers, TRL beside us: python benchmarks/grpo_run.py SHAPE STEPS ARM [ARM ...] [--completions 64] [--new 256] [--out FILE].

    native     our trainer as a user gets it: full fine-tuning, packed updates, rollouts by our own engine
    native-split  the same on split bfloat16 weights, which rollouts share without a copy (GPU)
    native-small  the same with moments in bfloat16 and compiled layers that recompute the MLP (GPU)
    native-budget  native-split with passes of at most 8,192 tokens
    native-compile  native-split with compiled layers
    varied, varied-compile  the same two where completions end anywhere, half of them before 87 tokens: every step has lengths of its own
    trl        our adapter: TRL's trainer and loss, rollouts by our own engine
    peer       TRL's GRPOTrainer alone, as its documentation runs it: rollouts by transformers' generate

The same random model, prompts of 64 tokens, 8 completions a prompt that never end before their limit (but for `varied`), a reward that is cheap. Every
arm is a process of its own, one after another. Times are those of whole steps after warm-up
(median); ours say how much of a step is rollout and update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from arms import ended, parts, trained_rows
from shapes import SHAPES, report

from backends import write_parts

WARMUP = 2
ENDS = 0.008
"""Share of the vocabulary that ends a completion where lengths vary; random weights draw all tokens about equally."""
SPLIT = {"train": {"optimizer": "adamw_split"}}
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "native": {},
    "native-split": SPLIT,
    "native-small": {"train": {"optimizer": "adamw_split_bf16"}, "model": {"selective_checkpointing": "mlp"}},
    "native-budget": {"train": SPLIT["train"] | {"micro_batch_tokens": 8192}},
    "native-compile": SPLIT | {"model": {"compile": True}},
    "varied": SPLIT,
    "varied-compile": SPLIT | {"model": {"compile": True}},
    "trl": {},
}


def distinct(completions: list[Any], **_: Any) -> list[float]:
    """Share of different characters: anything that varies."""
    return [len(set(str(text))) / 100 for text in completions]


def variety(completion: str) -> float:
    return len(set(completion)) / 100


def with_ends(model: Path) -> Path:
    """The same model, whose completions end at any of many tokens."""
    folder = model.with_name("model-varied")
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        if not (folder / file.name).exists() and file.name != "generation_config.json":
            (folder / file.name).symlink_to(file.resolve())
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    ends = list(range(vocab // 2, vocab // 2 + round(ENDS * vocab)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def ours(folder: Path, arm: str, steps: int, completions: int, new: int) -> dict[str, Any]:
    import torch

    from aligntune.api import create_trainer

    output = folder / f"run-{arm}"
    backend = "trl" if arm == "trl" else "native"
    run: dict[str, Any] = {
        "algorithm": "grpo", "backend": backend, "fallback": False,
        "dataset": {"name": str(folder / "prompts.jsonl")},
        "model": {"name_or_path": str(folder / "model"), "precision": "bf16" if torch.cuda.is_available() else "fp32", "use_peft": False, "max_seq_length": 64 + new},
        "rewards": [{"type": "grpo_run:variety"}],
        "train": {
            "max_steps": steps, "per_device_batch_size": completions, "num_generations": 8, "max_completion_length": new, "temperature": 1.0,
            "top_p": 1.0, "kl_coef": 0.0, "learning_rate": 1e-6, "lr_scheduler": "constant", "save_strategy": "no", "logging_steps": 1,
            "mask_truncated_completions": False, "group_by_length": False, "stop_token": "<pad>" if backend == "native" else "eos",
        },
        "logging": {"output_dir": str(output), "loggers": "none"},
    }  # fmt: skip
    if arm.startswith("varied"):
        run["model"]["name_or_path"] = str(with_ends(folder / "model"))
        run["train"]["stop_token"] = "eos"
    for section, values in OURS[arm].items():
        run[section] |= values
    rows = trained_rows(create_trainer(run), output)
    times = [row["elapsed_s"] for row in rows]
    steady = [b - a for a, b in itertools.pairwise(times)][WARMUP - 1 :]
    found: dict[str, Any] = {
        "step_s": median(steady),
        "longest_step_s": round(max(steady), 4),
        "until_first_step_s": round(times[0], 1),
    }
    for name in ("perf/rollout_seconds", "perf/scoring_seconds", "perf/update_seconds", "completions/mean_length"):
        values = [row[name] for row in rows[WARMUP:] if name in row]
        if values:
            found[name.partition("/")[2]] = median(values)
    memory = [row["memory_gib"] for row in rows if row.get("memory_gib")]
    return found | {"peak_gib": round(max(memory), 2) if memory else None}


def peer(folder: Path, steps: int, completions: int, new: int) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    arguments = GRPOConfig(
        output_dir=str(folder / "run-peer"), per_device_train_batch_size=completions, num_generations=8, max_completion_length=new,
        max_steps=steps, report_to="none", save_strategy="no", bf16=cuda, use_cpu=not cuda, learning_rate=1e-6, disable_tqdm=True,
        temperature=1.0, beta=0.0, gradient_checkpointing=False, generation_kwargs={"min_new_tokens": new},
    )  # fmt: skip
    seconds: list[float] = []

    class Meter(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize() if cuda else None
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize() if cuda else None
            seconds.append(time.perf_counter() - self.start)

    path = folder / "model"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if cuda else torch.float32)
    trainer = GRPOTrainer(
        model=model, args=arguments, reward_funcs=distinct, processing_class=AutoTokenizer.from_pretrained(path), callbacks=[Meter()],
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
    )  # fmt: skip
    trainer.train()
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry]  # fmt: skip
    return {
        "step_s": median(seconds[WARMUP:]),
        "mean_length": lengths[-1] if lengths else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
    }


def median(values: list[float]) -> float:
    return round(sorted(values)[len(values) // 2], 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("steps", type=int)
    parser.add_argument("arms", nargs="+", choices=[*OURS, "peer"])
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--out")
    parser.add_argument("--parts", help="where model and prompts are kept, or were by an earlier call")
    parser.add_argument("--limit", type=float, default=240, help="seconds that an arm may take")
    parser.add_argument("--folder", help="(for this script itself) where model and prompts are")
    args = parser.parse_args()
    if args.folder:
        folder, arm = Path(args.folder), args.arms[0]
        rest = (args.steps, args.completions, args.new)
        found = peer(folder, *rest) if arm == "peer" else ours(folder, arm, *rest)
        (folder / f"{arm}.json").write_text(json.dumps(found))
        return
    sizes = {"completions": args.completions, "new": args.new}
    with parts(args.parts, lambda folder: write_parts(folder, args.shape, lengths=[128] * 512)) as folder:
        more = ["--folder", str(folder), "--completions", str(args.completions), "--new", str(args.new)]
        commands = {arm: [sys.executable, __file__, args.shape, str(args.steps), arm, *more] for arm in args.arms}
        for arm, failure in ended(commands, folder, args.limit):
            found = {"failed": failure} if failure else json.loads((folder / f"{arm}.json").read_text())
            report(args.out, benchmark="grpo_run", arm=arm, shape=args.shape, steps=args.steps, **sizes, **found)


if __name__ == "__main__":
    main()
