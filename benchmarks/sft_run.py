"""Supervised fine-tuning by whole trainers, peers beside us: python benchmarks/sft_run.py SHAPE STEPS ARM [ARM ...] [--out FILE].

Ours, through the same config that a user writes (packed rows of 2048, batch 8, no gradient checkpointing):
    native     float32 masters under autocast, compiled layers (what a GPU gets by default in a run of 250 passes or more)
    mlp        the same, the two wide products of every MLP recomputed
    split      mlp, AdamW on split bfloat16 weights with float32 moments
    split16    mlp, moments in bfloat16
    lora       rank 16 on all projections
    lora-half  the same, one of the two wide products of every MLP recomputed
    lora-mlp   the same, both recomputed
    plain      float32 masters under autocast, layers not compiled (the default of a shorter run)
    budget     native, in passes of at most 8,192 tokens
    gc         plain, whole layers recomputed
    offload    plain, activations wait in CPU memory
    trl        the native arm's config on backend trl
Peers, as their own documentation runs them, on the same texts:
    trl-pack, trl-pack-liger    TRL's SFTTrainer: float32 weights under autocast, its own packing
    trl-pack-liger-gc           the same with gradient checkpointing, where it does not fit without
    trl-pack-liger-lora         the same with rank 16 on all projections
    unsloth-pack, unsloth-lora  Unsloth's FastLanguageModel under TRL's SFTTrainer (its full fine-tuning is bfloat16)

Every arm is a process of its own, one after another, and logs every ten steps, as all of them do unasked (a line that is logged waits for the GPU). Tokens a
second are real tokens over time, the median over windows of ten steps; the first window is warm-up. Losses are those logged, each a window's mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from arms import ended, parts, trained_rows
from shapes import PEAK_FLOPS, SHAPES, report, text_lengths

from backends import write_parts

WINDOW = 10
LENGTH, BATCH, RATE = 2048, 8, 1e-5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"selective_checkpointing": "mlp"}
LORA = {"peft_enabled": True, "lora_rank": 16, "lora_dropout": 0.0, "target_modules": TARGETS}
OURS: dict[str, dict[str, Any]] = {
    "native": {"model": {"compile": True}},
    "mlp": {"model": SMALL},
    "split": {"model": SMALL, "train": {"optimizer": "adamw_split"}},
    "split16": {"model": SMALL, "train": {"optimizer": "adamw_split_bf16"}},
    "lora": {"model": LORA | {"compile": True}},
    "lora-half": {"model": LORA | {"selective_checkpointing": "half"}},
    "lora-mlp": {"model": LORA | SMALL},
    "plain": {"model": {"compile": False}},
    "budget": {"model": {"compile": True}, "train": {"micro_batch_tokens": 8192}},
    "gc": {"model": {"compile": False, "gradient_checkpointing": True}},
    "offload": {"model": {"compile": False}, "train": {"activation_offloading": True}},
    "trl": {"backend": "trl"},
}
PEERS = ("trl-pack", "trl-pack-liger", "trl-pack-liger-gc", "trl-pack-liger-lora", "unsloth-pack", "unsloth-lora")


def ours(folder: Path, arm: str, steps: int) -> dict[str, Any]:
    """Train by our API; losses and speed are those of the run's own trail."""
    import torch

    from aligntune.api import create_trainer

    cuda = torch.cuda.is_available()
    changes = OURS[arm]
    output = folder / f"run-{arm}"
    run: dict[str, Any] = {
        "algorithm": "sft", "backend": "native", "fallback": False,
        "dataset": {"name": str(folder / "texts.jsonl"), "task_type": "text_generation"},
        "model": {"name_or_path": str(folder / "model"), "precision": "bf16" if cuda else "fp32", "max_seq_length": LENGTH, "gradient_checkpointing": False},
        "train": {"max_steps": steps, "per_device_batch_size": BATCH, "learning_rate": RATE, "lr_scheduler": "constant", "packing": True, "warmup_ratio": 0.0},
        "logging": {"output_dir": str(output), "loggers": "none", "log_interval": WINDOW, "save_strategy": "no"},
        "evaluation": {"max_new_tokens": 2},
    }  # fmt: skip
    for section, values in changes.items():
        run[section] = run[section] | values if isinstance(values, dict) else values
    rows = trained_rows(create_trainer(run), output)
    return {
        "tokens_per_s": round(statistics.median(row["tokens_per_second"] for row in rows[1:])),
        "peak_gib": max((row.get("memory_gib") or 0 for row in rows), default=None),
        "losses": [round(row["loss"], 4) for row in rows],
    }


def peer(folder: Path, arm: str, steps: int) -> dict[str, Any]:
    """Train by TRL or Unsloth alone."""
    if arm.startswith("unsloth"):
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        import unsloth  # noqa: F401  (it must come before TRL)
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda, path = torch.cuda.is_available(), str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if arm.startswith("unsloth"):
        from unsloth import FastLanguageModel

        full = arm == "unsloth-pack"
        model, tokenizer = FastLanguageModel.from_pretrained(
            path, max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=False, full_finetuning=full, local_files_only=True
        )  # fmt: skip
        if not full:
            model = FastLanguageModel.get_peft_model(
                model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing=False
            )
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=str(folder / f"run-{arm}"), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_steps=steps,
        max_length=LENGTH, report_to="none", save_strategy="no", logging_steps=WINDOW, bf16=cuda, use_cpu=not cuda, learning_rate=RATE,
        lr_scheduler_type="constant", optim="adamw_torch_fused" if cuda else "adamw_torch", disable_tqdm=True, packing=True,
        use_liger_kernel="liger" in arm, gradient_checkpointing="gc" in arm,
    )  # fmt: skip
    adapter = None
    if arm == "trl-pack-liger-lora":
        from peft import LoraConfig

        adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    ends: list[float] = []
    tokens: list[Any] = []

    class Meter(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step % WINDOW == 0:
                torch.cuda.synchronize() if cuda else None
                ends.append(time.perf_counter())

    rows = load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train")
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Meter()], peft_config=adapter,
    )  # fmt: skip
    inner = trainer.compute_loss

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens.append(mask.sum() if mask is not None else inputs["input_ids"].numel())
        return inner(model, inputs, *args, **kwargs)

    trainer.compute_loss = counted
    trainer.train()
    counts = [sum(map(int, tokens[at : at + WINDOW])) for at in range(WINDOW, len(tokens), WINDOW)]
    times = [end - begin for begin, end in itertools.pairwise(ends)]
    return {
        "tokens_per_s": round(statistics.median(count / seconds for count, seconds in zip(counts, times))),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "losses": [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
        "gradient_accumulation": trainer.args.gradient_accumulation_steps,
    }


def one(folder: Path, arm: str, steps: int) -> None:
    found = (peer if arm in PEERS else ours)(folder, arm, steps)
    (folder / f"{arm}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("steps", type=int)
    parser.add_argument("arms", nargs="+", choices=[*OURS, *PEERS])
    parser.add_argument("--out")
    parser.add_argument("--parts", help="where model and data are kept, or were by an earlier call")
    parser.add_argument("--limit", type=float, default=240, help="seconds that an arm may take")
    parser.add_argument("--folder", help="(for this script itself) where model and texts are")
    args = parser.parse_args()
    if args.steps < 2 * WINDOW:
        parser.error(f"STEPS is {args.steps}: a window of {WINDOW} is warm-up, so at least {2 * WINDOW} are needed")
    if args.folder:
        one(Path(args.folder), args.arms[0], args.steps)
        return
    shape = SHAPES[args.shape]
    per_layer = 2 * shape["hidden_size"] ** 2 * (1 + shape["num_key_value_heads"] / shape["num_attention_heads"]) + 3 * shape["hidden_size"] * shape["intermediate_size"]  # fmt: skip
    parameters = shape["num_hidden_layers"] * per_layer + shape["vocab_size"] * shape["hidden_size"]

    def write(folder: Path) -> None:
        write_parts(folder, args.shape, lengths=text_lengths(args.steps * BATCH * 12, LENGTH))

    with parts(args.parts, write) as folder:
        base = [sys.executable, __file__, args.shape, str(args.steps)]
        commands = {arm: [*base, arm, "--folder", str(folder)] for arm in args.arms}
        for arm, failure in ended(commands, folder, args.limit):
            found = {"failed": failure} if failure else json.loads((folder / f"{arm}.json").read_text())
            if not failure:
                flops = (4 if "lora" in arm else 6) * parameters  # a token's; frozen weights take no gradient
                found["mfu"] = round(flops * found["tokens_per_s"] / PEAK_FLOPS, 4)
            report(args.out, benchmark="sft_run", arm=arm, shape=args.shape, steps=args.steps, **found)


if __name__ == "__main__":
    main()
