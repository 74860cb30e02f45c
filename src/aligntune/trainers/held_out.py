"""How good is the policy on prompts it does not train on? Greedy answers, scored by the rewards, at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.reporting import Recorder
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import RolloutEngine, SamplingParams
from aligntune.trainers.rollout_phase import reward_arguments

SHOWN = 4
"""Answers written to the samples of each evaluation."""


class HeldOut:
    """Metrics of held-out prompts: `reward` (the weighted sum), `rewards/NAME` (raw means), and `pass@1`.

    `pass@1` is the share of prompts whose one greedy answer gets full marks (1) from the first reward. It is the task's own
    metric wherever that reward is a verifier, and shows when the reward rises and the task does not. Running means of normalised
    rewards are left alone.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], engine: RolloutEngine, rewards: RewardSet, tokenizer: Any, params: SamplingParams, recorder: Recorder,
        batch_size: int = 64,
    ) -> None:  # fmt: skip
        self.rows, self.engine, self.rewards, self.tokenizer = rows, engine, rewards, tokenizer
        self.params, self.recorder, self.batch_size = params, recorder, batch_size

    def __call__(self, step: int) -> dict[str, float]:
        totals: list[float] = []
        raw: dict[str, list[float]] = {name: [] for name in self.rewards.names}
        passed: list[bool] = []
        lengths: list[int] = []
        finished: list[bool] = []
        for start in range(0, len(self.rows), self.batch_size):
            rows = [self.rows[at] for at in range(start, min(start + self.batch_size, len(self.rows)))]
            found = self.engine.generate([row["prompt_ids"] for row in rows], self.params)
            arguments = reward_arguments(rows, found.completion_ids, self.tokenizer, 1)
            scores = self.rewards.score(*arguments, update=False)
            totals += [total for total in scores.total if total is not None]
            for name, stages in scores.by_reward.items():
                raw[name] += [score for score in stages.raw if score is not None]
            first = scores.by_reward[self.rewards.names[0]].raw
            passed += [score is not None and score >= 1 - 1e-9 for score in first]
            lengths += map(len, found.completion_ids)
            finished += found.finished
            if start == 0:
                self._show(step, rows, arguments[1], scores)
        metrics = {"reward": _mean(totals), "pass@1": _mean(passed)}
        metrics |= {f"rewards/{name}": _mean(values) for name, values in raw.items()}
        return metrics | {"completions/mean_length": _mean(lengths), "completions/truncated_share": 1 - _mean(finished)}

    def _show(self, step: int, rows: Sequence[Mapping[str, Any]], completions: Sequence[str], scores: Any) -> None:
        for at, row in enumerate(rows[:SHOWN]):
            by_name = {name: stages.raw[at] for name, stages in scores.by_reward.items()}
            answer = row.get("answer") or row.get("reference")
            sample = {"prompt": row.get("prompt", row["prompt_text"]), "completion": completions[at], "rewards": by_name}
            self.recorder.sample(step, sample | ({"reference": str(answer)} if answer is not None else {}))


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / len(values) if values else float("nan")
