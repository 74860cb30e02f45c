"""How good is the policy on prompts it does not train on? Greedy answers, scored by the rewards, at every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.data.pairs import asked_of
from aligntune.reporting import Recorder
from aligntune.rewards import RewardSet
from aligntune.rewards.base import COLUMN_SYNONYMS
from aligntune.rollouts.base import RolloutEngine, SamplingParams
from aligntune.trainers.parallel import gathered
from aligntune.trainers.ranks import rank, world_size
from aligntune.trainers.rollout_phase import reward_arguments

SHOWN = 4
"""Answers written to the samples of each evaluation."""


class HeldOut:
    """Metrics of held-out prompts, each answered once, greedily.

    | metric | |
    |---|---|
    | `reward` | mean of the weighted sum |
    | `rewards/NAME/mean` | mean of a reward's raw score, without weight, clip or normalisation |
    | `rewards/NAME/accuracy` | share of full marks: the top of the reward's range, or 1 |
    | `pass@1` | the accuracy of the first reward function: the task's own metric where that one is a verifier |
    | `completions/...` | mean length and share of answers that did not end |

    A reward that rises while `pass@1` does not shows that the policy games it. Running means of normalised rewards are left
    alone. Prompts are shared out over the processes.
    """

    def __init__(
        self, rows: Any, engine: RolloutEngine, rewards: RewardSet, tokenizer: Any, params: SamplingParams, recorder: Recorder,
        batch_size: int = 64,
    ) -> None:  # fmt: skip
        self.rows, self.engine, self.rewards, self.tokenizer = rows, engine, rewards, tokenizer
        self.params, self.recorder, self.batch_size = params, recorder, batch_size

    def __call__(self, step: int) -> dict[str, float]:
        mine = range(rank(), len(self.rows), world_size())
        records: list[dict[str, Any]] = []
        for start in range(0, len(mine), self.batch_size):
            rows = [self.rows[at] for at in mine[start : start + self.batch_size]]
            found, texts = self._answers(rows)
            if start == 0:
                self._show(step, rows, texts, found)
            records += found
        return self._metrics(gathered(records))

    def _answers(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """(scores and length of each answer, the answers)."""
        found = self.engine.generate([row["prompt_ids"] for row in rows], self.params)
        arguments = reward_arguments(rows, found.completion_ids, self.tokenizer, 1)
        scores = self.rewards.score(*arguments, update=False)
        records = [
            {
                "total": scores.total[at],
                "raw": {name: stages.raw[at] for name, stages in scores.by_reward.items()},
                "length": len(found.completion_ids[at]),
                "ended": found.finished[at],
            }
            for at in range(len(rows))
        ]
        return records, arguments[1]

    def _metrics(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        metrics = {"reward": _mean([record["total"] for record in records])}
        for entry in self.rewards.entries:
            raw = [record["raw"][entry.name] for record in records]
            metrics[f"rewards/{entry.name}/mean"] = _mean(raw)
            if entry.reward.name == "reward_model":  # its scores have no full marks
                continue
            top = 1.0 if entry.reward.range[1] is None else entry.reward.range[1]
            passed = _mean([float(score is not None and score >= top - 1e-6) for score in raw])
            metrics[f"rewards/{entry.name}/accuracy"] = passed
            metrics.setdefault("pass@1", passed)
        metrics["completions/mean_length"] = _mean([record["length"] for record in records])
        metrics["completions/truncated_share"] = _mean([float(not record["ended"]) for record in records])
        return metrics

    def _show(
        self, step: int, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> None:
        for row, text, record in list(zip(rows, texts, records, strict=True))[:SHOWN]:
            sample = {"prompt": asked_of(row), "completion": text, "reward": record["total"], "rewards": record["raw"]}
            answer = next((row[name] for name in COLUMN_SYNONYMS["answer"] if row.get(name) is not None), None)
            self.recorder.sample(step, sample | ({"reference": str(answer)} if answer is not None else {}))


def _mean(values: Sequence[float | None]) -> float:
    """Over the values that are there; NaN without any."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else float("nan")
