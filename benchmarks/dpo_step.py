"""Memory and tokens a second of DPO training, ours against TRL: python benchmarks/dpo_step.py SHAPE STEPS ARM [ARM ...] [--out FILE].

An ARM is native | trl, with gc (gradient checkpointing) joined to it by a dash (trl-gc); native also with compile (layers),
mlp (they recompute the wide products of the MLP) and split16 (AdamW on split bfloat16 weights). Each arm runs in a process of its
own on the same pairs: prompts of 100 tokens, answers log-normal with a median of 150, at most 1,024 together, 8 pairs a step,
full fine-tuning in bfloat16 autocast with a frozen reference. Real tokens of both sides are counted, padding never.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time

import torch
from datasets import Dataset
from shapes import SHAPES, peak_gib, report
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

BATCH, WARMUP = 8, 3


def pairs(count: int) -> Dataset:
    rng = random.Random(2)

    def answer() -> list[int]:
        return [rng.randrange(10, 2000) for _ in range(int(min(924, max(10, rng.lognormvariate(math.log(150), 0.7)))))]

    rows = [
        {"prompt_ids": [rng.randrange(10, 2000) for _ in range(100)], "chosen_ids": answer(), "rejected_ids": answer()}
        for _ in range(count)
    ]
    return Dataset.from_list(
        [row | {"length": 100 + max(len(row["chosen_ids"]), len(row["rejected_ids"]))} for row in rows]
    )


class Meter(TrainerCallback):
    """Seconds of each step, with the device idle at both ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        synchronise()
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        synchronise()
        self.seconds.append(time.perf_counter() - self.start)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def model(shape: str, implementation: str):
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen2ForCausalLM._from_config(config, attn_implementation=implementation, dtype=torch.float32)


def native(shape: str, rows: Dataset, common: dict, meter: Meter, parts: list[str]):
    from transformers import TrainingArguments

    from aligntune.algorithms import base
    from aligntune.config.algorithms import DPOConfig as Settings
    from aligntune.models.kernels.attention import resolve_attention
    from aligntune.models.kernels.compile import compile_layers
    from aligntune.optim.split_adamw import SplitAdamW
    from aligntune.trainers.pairs_trainer import PairsTrainer
    from aligntune.trainers.reference import Reference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, frozen = (
        model(shape, resolve_attention("auto", device, Qwen2Config(**SHAPES[shape]))[0]) for _ in range(2)
    )
    own = {}
    if common["bf16"]:
        frozen.to(torch.bfloat16)
    if "split16" in parts:
        policy.to(torch.bfloat16)
        common |= {"bf16": False}
        own = {"optimizer_cls_and_kwargs": (SplitAdamW, {"lr": common["learning_rate"], "moments": torch.bfloat16})}
    if "compile" in parts:
        compile_layers(policy, keep="mlp" if "mlp" in parts else "all")
    reference = Reference(frozen.eval().requires_grad_(False), "copy")
    arguments = TrainingArguments(**common)
    return PairsTrainer(
        policy,
        arguments,
        spec=base.get("dpo"),
        settings=Settings(),
        reference=reference,
        train_dataset=rows,
        callbacks=[meter],
        **own,
    )


def trl(shape: str, rows: Dataset, common: dict, meter: Meter, _: list[str]):
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from aligntune.backends.trl.dpo import _Collator, _rows

    frozen = model(shape, "sdpa")
    if common["bf16"]:
        frozen.to(torch.bfloat16)
    arguments = DPOConfig(**common, max_length=None, disable_dropout=True)
    return DPOTrainer(
        model=model(shape, "sdpa"), ref_model=frozen, args=arguments, data_collator=_Collator(DataCollatorForPreference(pad_token_id=0)),
        train_dataset=_rows(rows), processing_class=tokenizer(), callbacks=[meter],
    )  # fmt: skip


def run(shape: str, steps: int, arm: str, out: str | None) -> None:
    cuda = torch.cuda.is_available()
    rows = pairs(steps * BATCH)
    common = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": BATCH, "max_steps": steps, "learning_rate": 1e-6, "bf16": cuda,
        "use_cpu": not cuda, "gradient_checkpointing": "gc" in arm, "report_to": "none", "save_strategy": "no", "logging_steps": 10_000,
        "disable_tqdm": True, "remove_unused_columns": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    meter = Meter()
    trainer = (native if arm.startswith("native") else trl)(shape, rows, common, meter, arm.split("-"))
    trainer.train()
    lengths = [2 * 100 + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    seconds, tokens = sum(meter.seconds[WARMUP:]), sum(lengths[WARMUP * BATCH :])
    report(out, bench="dpo_step", arm=arm, shape=shape, steps=steps, tokens_per_s=round(tokens / seconds), step_s=round(seconds / (steps - WARMUP), 4),
           peak_gib=peak_gib())  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("steps", type=int)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--out")
    given = parser.parse_args()
    if len(given.arms) == 1:
        run(given.shape, given.steps, given.arms[0], given.out)
        return
    for arm in given.arms:
        command = [
            sys.executable,
            __file__,
            given.shape,
            str(given.steps),
            arm,
            *(["--out", given.out] if given.out else []),
        ]
        subprocess.run(command, check=False, env=os.environ)


if __name__ == "__main__":
    main()
