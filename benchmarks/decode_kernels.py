"""Microseconds of the decode kernels by launch shape, beside the memory floor: python benchmarks/decode_kernels.py.

Decode attention: Qwen2.5-0.5B heads (14 over 2, size 64), 256 past tokens, 24 layers' caches in turn. Draw: vocabulary
151,936. Times are those of CUDA-graph replays.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from shapes import report

from aligntune.models.kernels import decode_triton

BANDWIDTH = 3.0e12  # bytes a second, a large device-to-device copy on an H100


def graph_time(function, calls: int) -> float:
    """Median microseconds of one of the `calls` that `function` makes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def attention(rows: int, past: int, out: str | None) -> None:
    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    layers = [(normal(rows, 2, 384, 64), normal(rows, 2, 384, 64)) for _ in range(24)]
    query, key, value = normal(rows, 14, 64), normal(rows, 2, 64), normal(rows, 2, 64)
    positions = torch.full((rows,), past, device="cuda")
    floor = 2 * rows * 2 * past * 64 * 2 / BANDWIDTH * 1e6
    for block, warps, stages in (
        (64, 4, 2),
        (64, 4, 3),
        (128, 4, 2),
        (128, 4, 3),
        (32, 4, 4),
        (64, 2, 3),
        (64, 2, 4),
        (128, 8, 3),
    ):
        decode_triton.DECODE_BLOCK, decode_triton.DECODE_WARPS, decode_triton.DECODE_STAGES = block, warps, stages

        def step() -> None:
            for keys, values in layers:
                decode_triton.decode_attention(query, key, value, keys, values, positions, 0.125, 0)

        report(
            out,
            benchmark="decode_attention",
            rows=rows,
            block=block,
            warps=warps,
            stages=stages,
            us=round(graph_time(step, 24), 1),
            floor_us=round(floor, 1),
        )


def draw(rows: int, out: str | None) -> None:
    scores = torch.randn(rows, 151_936, device="cuda")
    ids, one = torch.arange(rows, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    for segment, block, warps in ((8192, 2048, 4), (4096, 2048, 4), (8192, 4096, 8), (4096, 4096, 8), (16384, 2048, 4)):
        decode_triton.SEGMENT, decode_triton.DRAW_BLOCK, decode_triton.DRAW_WARPS = segment, block, warps
        microseconds = graph_time(lambda: decode_triton.draw_rows(scores, one, ids, one, False), 1)
        floor = scores.numel() * 4 / BANDWIDTH * 1e6
        report(
            out,
            benchmark="draw",
            rows=rows,
            segment=segment,
            block=block,
            warps=warps,
            us=round(microseconds, 1),
            floor_us=round(floor, 1),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    args = parser.parse_args()
    for rows in (128, 512):
        attention(rows, 256, args.out)
        draw(rows, args.out)


if __name__ == "__main__":
    main()
