"""Tokens a second of a full fine-tuning step: python benchmarks/sft_step.py SHAPE STEPS ARM [ARM ...] [--out FILE].

An ARM is joined from: sdpa | varlen (attention), compile (decoder layers), gc (gradient checkpointing), micro8k (two
micro-batches of 8,192 tokens for one of 16,384), plain (the model's own logits and loss for the chunked head), lora
(rank 16 on all projections), cheap, half or mlp (what compiled layers recompute), split or splitbf16 (our AdamW with exact
masters; moments float32 or bfloat16).
Weights bfloat16, fused AdamW in bfloat16, packed rows of 16,384 tokens an optimiser step, real tokens counted.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from peft import LoraConfig, get_peft_model
from shapes import PEAK_FLOPS, SHAPES, build_model, packed_batches, peak_gib, report

from aligntune.models.forward import packed_loss, trunk_hidden
from aligntune.models.kernels.attention import resolve_attention
from aligntune.models.kernels.compile import compile_layers
from aligntune.models.packed import PackedRows
from aligntune.optim.split_adamw import SplitAdamW

WARMUP = 4


def loss_of(model, rows: PackedRows, plain: bool) -> torch.Tensor:
    if not plain:
        return packed_loss(model, rows, reduction="sum")
    logits = model.lm_head(trunk_hidden(model, rows))[rows.predictors]
    return torch.nn.functional.cross_entropy(logits.float(), rows.targets, reduction="sum")


def run(shape: str, steps: int, arm: str, out: str | None, profile: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = arm.split("-")
    wanted = "sdpa" if "sdpa" in parts else "auto"
    implementation, _ = resolve_attention(wanted, device)
    model = build_model(shape, device, implementation).train()
    if "gc" in parts:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "lora" in parts:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
        get_peft_model(
            model, config, autocast_adapter_dtype=False
        )  # in place: the layers of `model` carry the adapters
        if "gc" in parts:
            model.enable_input_require_grads()
    if "compile" in parts:
        torch._dynamo.reset()
        compile_layers(model, keep=next((keep for keep in ("cheap", "half", "mlp") if keep in parts), "all"))
    trained = [p for p in model.parameters() if p.requires_grad]
    if "split" in parts or "splitbf16" in parts:
        moments = torch.bfloat16 if "splitbf16" in parts else torch.float32
        optimizer = SplitAdamW(trained, lr=1e-5, moments=moments)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda")
    micro = 2 if "micro8k" in parts else 1
    batches = packed_batches(steps * micro, 16_384 // micro if device == "cuda" else 4096, SHAPES[shape]["vocab_size"])
    ready = [PackedRows.build(rows, [[True] * len(row) for row in rows], device) for rows in batches]

    def step(i: int) -> int:
        group = ready[i * micro : (i + 1) * micro]
        total = sum(len(rows.targets) for rows in group)
        for rows in group:
            (loss_of(model, rows, "plain" in parts) / total).backward()
        optimizer.step()
        optimizer.zero_grad()
        return sum(rows.input_ids.shape[1] for rows in group)

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    for i in range(WARMUP):
        step(i)
    synchronize()
    first = time.perf_counter() - begin
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    tokens = sum(step(i) for i in range(WARMUP, steps))
    synchronize()
    rate = tokens / (time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    report(
        out, benchmark="sft_step", arm=arm, shape=shape, attention=implementation, tokens_per_s=round(rate),
        mfu=round(6 * parameters * rate / PEAK_FLOPS, 4), peak_gib=peak_gib(), warmup_s=round(first, 1), steps=steps - WARMUP,
    )  # fmt: skip
    if profile:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        ) as trace:
            step(steps - 1)
            synchronize()
        print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("steps", type=int)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    for arm in args.arms:
        run(args.shape, args.steps, arm, args.out, args.profile)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
