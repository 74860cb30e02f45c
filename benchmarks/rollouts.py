"""New tokens a second of the rollout engines: python benchmarks/rollouts.py SHAPE ARM [ARM ...] [--out FILE].

An ARM is ENGINE:ROWSxNEW, engines transformers, graph (plain kernels in CUDA graphs) and graph-compiled. Prompts of 128
random tokens, no stop token, temperature 1. The first run (capture, compilation) is timed apart.
"""

from __future__ import annotations

import argparse
import gc
import random
import time

import torch
from shapes import SHAPES, build_model, peak_gib, report

from aligntune.models.forward import packed_log_probs
from aligntune.models.packed import PackedRows
from aligntune.rollouts.base import SamplingParams
from aligntune.rollouts.graph import GraphEngine
from aligntune.rollouts.transformers import TransformersEngine


def mismatch(model, prompts, rollouts) -> float:
    """Mean distance in nats between the engine's log-probabilities and a forward pass over the first 16 rows."""
    device = next(model.parameters()).device
    rows = PackedRows.from_completions(prompts[:16], rollouts.completion_ids[:16], device)
    with torch.no_grad():
        want = packed_log_probs(model, rows).log_probs.cpu()
    got = torch.tensor([x for row in rollouts.log_probs[:16] for x in row])
    return round((got - want).abs().mean().item(), 5)


def run(model, shape: str, arm: str, out: str | None, repeats: int, profile: bool) -> None:
    name, size = arm.split(":")
    count, new = map(int, size.split("x"))
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 2000) for _ in range(128)] for _ in range(count)]
    engine = (
        TransformersEngine(model)
        if name == "transformers"
        else GraphEngine(model, compile_layers=name.endswith("compiled"))
    )
    params = SamplingParams(max_new_tokens=new, seed=0)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        rollouts = engine.generate(prompts, params)
        times.append(time.perf_counter() - start)
    tokens = sum(map(len, rollouts.completion_ids))
    report(
        out, benchmark="rollouts", arm=name, shape=shape, rows=count, new=new, tokens_per_s=round(tokens / min(times[1:] or times)),
        first_s=round(times[0], 1), peak_gib=peak_gib(), mismatch_nats=mismatch(model, prompts, rollouts),
    )  # fmt: skip
    if profile and isinstance(engine, GraphEngine):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        ) as trace:
            engine.generate(prompts, SamplingParams(max_new_tokens=new, seed=1))
        print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    model = build_model(args.shape, "cuda" if torch.cuda.is_available() else "cpu").eval()
    for arm in args.arms:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run(model, args.shape, arm, args.out, args.repeats, args.profile)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
