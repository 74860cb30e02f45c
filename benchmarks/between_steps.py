"""What the processor does for a fine-tuning step besides the model: python benchmarks/between_steps.py ARM [ARM ...] [--out FILE].

Arms: the weights that are trained, by our trainer or with the walks of transformers' own:
    full, full-walks      all weights
    lora, lora-walks      rank 4 on all projections

A model of 24 narrow layers (0.5B's depth), SFT, a log line every step, on the CPU. From the time of each step that of the loss,
the backward pass and the optimiser's step is taken off; the median of the rest over the steps after warm-up. On a GPU that rest
is time in which it waits, if a step waits for its log.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arms import ended, parts, trained_rows
from sft_run import TARGETS
from shapes import SHAPES, report, text_lengths

from backends import write_parts

ARMS = ("full", "full-walks", "lora", "lora-walks")
STEPS, WARMUP = 60, 10
SHAPES["deep"] = SHAPES["tiny"] | {"num_hidden_layers": 24}


def one(folder: Path, arm: str) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer

    from aligntune.api import create_trainer
    from aligntune.trainers.native import NativeTrainer
    from aligntune.trainers.packed_sft import PackedSFTTrainer

    torch.set_num_threads(1)
    ends: list[float] = []
    inside: list[float] = []

    def timed(owner: type, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                inside.append(time.perf_counter() - started)

        setattr(owner, name, measured)

    for owner, name in ((PackedSFTTrainer, "compute_loss"), (Accelerator, "backward"), (AcceleratedOptimizer, "step")):
        timed(owner, name)
    if arm.endswith("walks"):
        NativeTrainer._run_epoch = Trainer._run_epoch
        NativeTrainer.floating_point_ops = Trainer.floating_point_ops
    log = Trainer._maybe_log_save_evaluate

    def step_ends(self: Any, *args: Any, **kwargs: Any) -> None:
        log(self, *args, **kwargs)
        ends.append(time.perf_counter() - sum(inside))

    Trainer._maybe_log_save_evaluate = step_ends
    lora = {"peft_enabled": True, "lora_rank": 4, "lora_dropout": 0.0, "target_modules": TARGETS} if arm.startswith("lora") else {}  # fmt: skip
    output = folder / f"run-{arm}"
    run = {
        "algorithm": "sft", "backend": "native", "fallback": False,
        "dataset": {"name": str(folder / "texts.jsonl"), "task_type": "text_generation"},
        "model": {"name_or_path": str(folder / "model"), "precision": "fp32", "max_seq_length": 64, "gradient_checkpointing": False} | lora,
        "train": {"max_steps": STEPS, "per_device_batch_size": 1, "learning_rate": 1e-5, "packing": True},
        "logging": {"output_dir": str(output), "loggers": "none", "log_interval": 1, "save_strategy": "no"},
        "evaluation": {"max_new_tokens": 2},
    }  # fmt: skip
    rows = trained_rows(create_trainer(run), output)
    rest = [after - before for before, after in zip(ends[WARMUP:], ends[WARMUP + 1 :])]
    found = {"between_ms": round(1e3 * statistics.median(rest), 2), "loss": round(rows[-1]["loss"], 4)}
    (folder / f"{arm}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arms", nargs="+", choices=ARMS)
    parser.add_argument("--out")
    parser.add_argument("--folder", help="(for this script itself) where model and texts are")
    args = parser.parse_args()
    if args.folder:
        one(Path(args.folder), args.arms[0])
        return
    with parts(None, lambda folder: write_parts(folder, "deep", lengths=text_lengths(STEPS * 12, 128))) as folder:
        commands = {arm: [sys.executable, __file__, arm, "--folder", str(folder)] for arm in args.arms}
        for arm, failure in ended(commands, folder, 300):
            found = {"failed": failure} if failure else json.loads((folder / f"{arm}.json").read_text())
            report(args.out, benchmark="between_steps", arm=arm, **found)


if __name__ == "__main__":
    main()
