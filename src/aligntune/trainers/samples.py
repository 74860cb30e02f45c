"""Sample logging: what the policy says to chosen prompts, while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from aligntune.config.rl import SampleLoggingConfig
from aligntune.reporting import Recorder
from aligntune.rollouts.base import RolloutEngine, SamplingParams


class SampleLogger(TrainerCallback):
    """Writes `num_samples` answers to each prompt, every `interval_steps`, every `percent_of_max_steps` of the run, or both."""

    def __init__(
        self, config: SampleLoggingConfig, prompts: Sequence[Any], prompt_ids: Sequence[Sequence[int]], engine: RolloutEngine, tokenizer: Any,
        recorder: Recorder, stop_token_ids: Sequence[int], seed: int,
    ) -> None:  # fmt: skip
        self.config, self.prompts, self.prompt_ids = config, prompts, prompt_ids
        self.engine, self.tokenizer, self.recorder = engine, tokenizer, recorder
        self.params = SamplingParams(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            num_generations=config.num_samples, stop_token_ids=tuple(stop_token_ids), seed=seed,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_due(self.config, state.global_step, state.max_steps):
            self.write(state.global_step)

    def write(self, step: int) -> None:
        found = self.engine.generate(self.prompt_ids, self.params)
        texts = self.tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True)
        count = self.config.num_samples
        for at, text in enumerate(texts):
            self.recorder.sample(step, {"prompt": self.prompts[at // count], "completion": text, "sample": at % count})


def is_due(config: SampleLoggingConfig, step: int, max_steps: int) -> bool:
    """Whether samples are written after `step`."""
    if config.interval_steps is not None and step % config.interval_steps == 0:
        return True
    if config.percent_of_max_steps is not None and max_steps > 0:
        every = max(1, round(config.percent_of_max_steps * max_steps))
        return step % every == 0
    return False
