"""What does the policy say to chosen prompts, while it trains?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from aligntune.config.rl import SampleLoggingConfig
from aligntune.reporting import Recorder
from aligntune.rollouts.base import RolloutEngine, SamplingParams

DEFAULT_SHARE = 0.1
"""Share of the run between samples while neither interval is given."""


class SampleLogger(TrainerCallback):
    """Writes `num_samples` answers to each prompt: before the first step, then every `interval_steps`, every
    `percent_of_max_steps` of the run, or both (every tenth of the run when neither is given), and after the last step.

    `asked`: (prompt as asked, its tokens).
    """

    def __init__(
        self, config: SampleLoggingConfig, asked: Sequence[tuple[Any, Sequence[int]]], engine: RolloutEngine, tokenizer: Any,
        recorder: Recorder, stop_token_ids: Sequence[int], seed: int,
    ) -> None:  # fmt: skip
        self.config, self.asked = config, asked
        self.engine, self.tokenizer, self.recorder = engine, tokenizer, recorder
        self.params = SamplingParams(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            num_generations=config.num_samples, stop_token_ids=tuple(stop_token_ids), seed=seed,
        )  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.write(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if is_due(self.config, state.global_step, state.max_steps):
            self.write(state.global_step)

    def write(self, step: int) -> None:
        """Answer and record all prompts. Every process takes part, since an engine may need all of them."""
        found = self.engine.generate([ids for _, ids in self.asked], self.params)
        texts = self.tokenizer.batch_decode(found.completion_ids, skip_special_tokens=True)
        count = self.config.num_samples
        for at, text in enumerate(texts):
            sample = {"prompt": self.asked[at // count][0], "completion": text, "sample": at % count}
            self.recorder.sample(step, sample)


def is_due(config: SampleLoggingConfig, step: int, max_steps: int) -> bool:
    """Whether samples are written after `step`."""
    share = config.percent_of_max_steps
    if config.interval_steps is None and share is None:
        share = DEFAULT_SHARE
    intervals = [config.interval_steps, None if share is None else max(1, round(share * max_steps))]
    return step == max_steps or any(step % every == 0 for every in intervals if every is not None)
