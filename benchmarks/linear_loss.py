"""Time and peak memory of the chunked head against plain logits: python benchmarks/linear_loss.py [--out FILE].

Forward and backward, N tokens, hidden 896, vocabulary 151,936, bfloat16. Peak memory counts what is allocated above the
inputs, gradients included.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from shapes import report
from torch.nn import functional as F

from aligntune.models.kernels import linear_loss
from aligntune.models.kernels.linear_loss import linear_cross_entropy, linear_log_probs


def measure(function, repeats: int = 7) -> tuple[float, float]:
    """Median milliseconds and peak GiB above what was allocated before."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out")
    args = parser.parse_args()
    hidden = torch.randn(args.tokens, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(151936, 896, device="cuda") * 0.02).bfloat16().requires_grad_()
    labels = torch.randint(0, 151936, (args.tokens,), device="cuda")

    def backward(value: torch.Tensor) -> None:
        hidden.grad = weight.grad = None
        value.backward()

    def plain_log_probs() -> torch.Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None]).sum()

    arms = {
        "plain cross-entropy": lambda: backward(F.cross_entropy((hidden @ weight.T).float(), labels)),
        "plain log-probs": lambda: backward(plain_log_probs()),
    }
    for dtype in ("float32", "bfloat16"):
        for mib in (512, 1024):

            def set_chunk(mib=mib) -> None:
                linear_loss.CHUNK_BYTES["cuda"] = mib * 2**20

            def cross_entropy(set_chunk=set_chunk, wide=dtype == "float32") -> None:
                set_chunk()
                backward(linear_cross_entropy(hidden, weight, labels, float32_logits=wide))

            def log_probs(set_chunk=set_chunk, wide=dtype == "float32") -> None:
                set_chunk()
                backward(linear_log_probs(hidden, weight, labels, float32_logits=wide).log_probs.sum())

            def no_grad(set_chunk=set_chunk, wide=dtype == "float32") -> None:
                set_chunk()
                with torch.no_grad():
                    linear_log_probs(hidden, weight, labels, entropy=True, float32_logits=wide)

            arms[f"cross-entropy, {dtype} logits, {mib} MiB"] = cross_entropy
            arms[f"log-probs, {dtype} logits, {mib} MiB"] = log_probs
            arms[f"log-probs and entropy without gradient, {dtype} logits, {mib} MiB"] = no_grad
    for name, function in arms.items():
        milliseconds, peak = measure(function)
        report(
            args.out,
            benchmark="linear_loss",
            arm=name,
            tokens=args.tokens,
            ms=round(milliseconds, 2),
            peak_gib=round(peak, 2),
        )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
