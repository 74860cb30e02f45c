"""Rollouts on a model that Unsloth has patched: by its own `generate`, between its own two modes.

Its layers read a cache only after `for_inference`, and train only after `for_training`; everything else is as in
`rollouts.transformers`, log-probabilities included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from aligntune.rollouts.base import Rollouts, SamplingParams
from aligntune.rollouts.transformers import TransformersEngine


def patched_by_unsloth(model: nn.Module) -> bool:
    """Whether `model` came from Unsloth's loader."""
    return callable(getattr(model, "for_inference", None)) and callable(getattr(model, "for_training", None))


class UnslothEngine(TransformersEngine):
    """`generate` on the trainer's own model, LoRA adapters live. The model's mode and its checkpointing are left as found."""

    name = "unsloth"

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        with _for_inference(self.model):
            return super().generate(prompt_ids, params)


@contextmanager
def _for_inference(model: Any) -> Iterator[None]:
    training = model.training
    modes = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
    checkpointing = next((mode for mode in modes if mode), False)
    model.for_inference()
    try:
        yield
    finally:
        model.for_training(use_gradient_checkpointing=checkpointing)
        model.train(training)
