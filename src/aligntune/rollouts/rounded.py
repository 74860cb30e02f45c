"""How does a policy with float32 masters speak? In the number format in which the trainer computes.

Under autocast the policy that learns is the one with rounded weights. A sampler on the float32 masters is another policy:
at usual learning rates the masters move far less in a step than a bfloat16 can show, so the sampler runs ahead of what the
trainer sees and the two drift apart (their log-probabilities differed by 0.3 nats after 20 steps of GRPO on a 135M model).
It is also several times slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aligntune.rollouts.base import RolloutEngine, Rollouts, SamplingParams


class RoundedEngine:
    """`engine` on the model's weights rounded to `dtype`: a copy of its own, made anew for each rollout, that stands in for
    the float32 weights while it runs. Weights of other formats (LoRA's base) are shared as ever."""

    def __init__(self, engine: RolloutEngine, model: nn.Module, dtype: torch.dtype) -> None:
        self.engine, self.model, self.dtype, self.name = engine, model, dtype, engine.name
        self._copies: dict[str, Tensor] = {}

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        with self._rounded():
            return self.engine.generate(prompt_ids, params)

    def update_weights(self) -> None:
        """See `RolloutEngine`."""
        self.engine.update_weights()

    def release(self) -> None:
        """See `RolloutEngine`: the rounded copy as well."""
        self._copies.clear()
        self.engine.release()

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """The copies keep their storage from one rollout to the next, as captured graphs need it."""
        masters = {name: p for name, p in self.model.named_parameters() if p.dtype == torch.float32}
        originals = {name: parameter.data for name, parameter in masters.items()}
        try:
            for name, parameter in masters.items():
                copy = self._copies.get(name)
                if copy is None or copy.shape != parameter.shape or copy.device != parameter.device:
                    copy = self._copies[name] = torch.empty_like(parameter.data, dtype=self.dtype)
                copy.copy_(parameter.data)
                parameter.data = copy
            yield
        finally:
            for name, original in originals.items():
                if masters[name].dtype == self.dtype:
                    self._copies[name] = masters[name].data  # where the engine has moved it
                masters[name].data = original
