"""One CUDA graph for each number of active rows, captured when it is first needed and replayed ever after."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch

from aligntune.models.kernels.compile import decoding_layers
from aligntune.rollouts.decode_state import DecodeState


def bucket_sizes(rows: int) -> list[int]:
    """Row counts that get a graph, largest first: `rows` rounded up to a multiple of 8, then 3/4, 1/2, 3/8, 1/4, ...

    >>> bucket_sizes(100)
    [104, 80, 56, 40, 32, 24, 16, 8]
    """
    top = -(-rows // 8) * 8
    sizes, size = {top}, float(top)
    while size > 8:
        sizes |= {-(-int(size * 3 / 4) // 8) * 8, -(-int(size / 2) // 8) * 8}
        size /= 2
    return sorted(sizes, reverse=True)


class StepGraphs:
    """Decode steps of `step(active)` as CUDA graphs that share one memory pool."""

    def __init__(self, causal: Any, state: DecodeState, step: Callable[[int], None], compile_layers: bool) -> None:
        self.causal, self.state, self.step = causal, state, step
        self.compile_layers = compile_layers
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.captured = _fingerprint(causal)

    def stale(self) -> bool:
        """Whether weights moved to other storage or adapters were switched since the capture. (Changed values are fine.)"""
        return _fingerprint(self.causal) != self.captured

    def run(self, active: int) -> None:
        """One step for the first `active` rows."""
        if active not in self.graphs:
            self.graphs[active] = self._capture(active)
        self.graphs[active].replay()

    def _capture(self, active: int) -> torch.cuda.CUDAGraph:
        was = self.state.snapshot()
        stream = _warmup_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with decoding_layers(self.causal, self.compile_layers):
            with torch.cuda.stream(stream):  # the first calls compile and set up libraries, which a capture cannot
                for _ in range(2):
                    self.step(active)
                    self.state.restore(was)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: loaders pin batches, NCCL watches its streams.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(active)
        self.state.restore(was)
        return graph


@cache
def _warmup_stream(_device: int) -> torch.cuda.Stream:
    """One for all captures on a device: cuBLAS keeps a workspace (32 MiB on an H100) for every stream that it ever saw."""
    return torch.cuda.Stream()


def _fingerprint(causal: Any) -> Hashable:
    """Storage of every parameter, and which adapters act."""
    adapters = [
        (tuple(module.active_adapters), module.disable_adapters, module.merged)
        for module in causal.modules()
        if hasattr(module, "lora_A")
    ]
    return tuple(p.data_ptr() for p in causal.parameters()), tuple(adapters)
