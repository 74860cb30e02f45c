"""Which engine answers now and then, between training steps, and keeps no memory from one time to the next?

A trainer's rollout engine lives on captured graphs and a cache that is there at every step. Evaluation asks a few dozen
questions every few hundred steps: what it keeps meanwhile is missing in training, and what it sets up must be cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from aligntune.models.forward import input_device
from aligntune.rollouts.base import RolloutEngine, Rollouts, SamplingParams
from aligntune.rollouts.graph import GraphEngine
from aligntune.rollouts.rounded import RoundedEngine
from aligntune.rollouts.select import select_engine
from aligntune.rollouts.transformers import TransformersEngine

CPU_ROWS = 32
"""Rows at a time on the CPU, where nothing bounds the cache: 1.5 GB for a model of 1B parameters and 700 tokens a row."""
TRANSFORMERS_ROWS = 8
"""Rows at a time of `generate`, which makes its cache anew for each batch, padded, and next to whatever training holds."""


class OccasionalEngine:
    """`engine`, which gives its memory back after every call."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self.name = engine, engine.name

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        try:
            return self.engine.generate(prompt_ids, params)
        finally:
            self.engine.release()

    def update_weights(self) -> None:
        """See `RolloutEngine`."""
        self.engine.update_weights()

    def release(self) -> None:
        """Nothing to do between calls."""


def occasional_engine(
    model: nn.Module, *, name: str = "auto", compute: torch.dtype | None = None, max_rows: int | None = None
) -> tuple[RolloutEngine, str]:
    """(engine, reason), chosen by `select_engine`. `compute`: the format in which float32 weights are used, if another.
    `max_rows`: rows at a time; None is as many as are sensible.

    Decode layers are not compiled: that takes half a minute to save a millisecond or two a step, and an evaluation has a
    few hundred steps, whatever the number of questions.
    """
    engine, why = select_engine(model, name, max_rows=max_rows, compile_layers=False)
    if max_rows is None and isinstance(engine, TransformersEngine):
        engine.max_rows = TRANSFORMERS_ROWS
    elif max_rows is None and isinstance(engine, GraphEngine) and input_device(model).type == "cpu":
        engine.max_rows = CPU_ROWS
    return OccasionalEngine(engine if compute is None else RoundedEngine(engine, model, compute)), why
