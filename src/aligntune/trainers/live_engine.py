"""Which rollout engine always speaks for the policy as it is now?"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from transformers import TrainerCallback

from aligntune.errors import ModelError
from aligntune.rollouts.base import RolloutEngine, Rollouts, SamplingParams

DIVERGED = (
    "the policy's log-probabilities are not finite: its training has diverged, or its weights were so from the start. Lower "
    "learning_rate, use precision bf16 or fp32, and see whether rewards are of a usual size; an earlier checkpoint can be resumed"
)


class LiveEngine(TrainerCallback):
    """Takes over the weights before the first rollout after they changed. Engines that share the trainer's weights do
    nothing then; vLLM loads them. Register it as a callback of the trainer."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self.name = engine, engine.name
        self._stale = False

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`. ModelError where the policy has come to say NaN."""
        self.update_weights()
        found = self.engine.generate(prompt_ids, params)
        said = found.sampler_log_probs if found.log_probs is None else found.log_probs
        if not all(isfinite(row[0]) for row in said if row):
            raise ModelError(DIVERGED)
        return found

    def update_weights(self) -> None:
        """Take over the weights if they changed."""
        if self._stale:
            self.engine.update_weights()
            self._stale = False

    def release(self) -> None:
        """See `RolloutEngine`."""
        self.engine.release()

    def weights_changed(self) -> None:
        """Say that the policy's weights were set from outside the trainer."""
        self._stale = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run has read other weights."""
        self._stale = self._stale or state.global_step > 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights changed."""
        self._stale = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The best weights may have been read back."""
        self._stale = True
