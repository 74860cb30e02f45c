"""The rollout phase: prompts in order, completions from the policy, and their rewards.

Dynamic sampling: prompts that the algorithm does not keep are replaced by others, at most `max_resample_batches` times. What is
missing then is filled with dropped ones, which are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.data.pairs import PROMPT_COLUMNS, asked_of
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import RolloutEngine, Rollouts, SamplingParams
from aligntune.trainers.prompt_stream import PromptStream
from aligntune.trainers.rollout import fill_missing

LEAST_KEPT = 0.25
"""Dynamic sampling draws for at least this share of kept prompts, however few were kept so far."""


@dataclass
class Scored:
    """P prompts with G completions each and their rewards."""

    rows: list[dict[str, Any]]
    rollouts: Rollouts
    rewards: Tensor
    """[P, G], NaN where no reward applied."""
    metrics: dict[str, float]
    fillers: int = 0
    """How many prompts at the end only fill up."""

    def take(self, prompts: Sequence[int]) -> Scored:
        """These prompts alone."""
        group = self.rewards.shape[1]
        at = [prompt * group + member for prompt in prompts for member in range(group)]
        found = self.rollouts
        rollouts = Rollouts(
            [found.completion_ids[i] for i in at],
            None if found.log_probs is None else [found.log_probs[i] for i in at],
            [found.sampler_log_probs[i] for i in at],
            [found.finished[i] for i in at],
        )
        return Scored([self.rows[prompt] for prompt in prompts], rollouts, self.rewards[list(prompts)], self.metrics)


def joined(parts: Sequence[Scored]) -> Scored:
    """Several draws as one, without their metrics."""
    rollouts = Rollouts([], [], [], [])
    for part in parts:
        rollouts.completion_ids += part.rollouts.completion_ids
        known = rollouts.log_probs is not None and part.rollouts.log_probs is not None
        rollouts.log_probs = [*rollouts.log_probs, *part.rollouts.log_probs] if known else None  # type: ignore[misc]
        rollouts.sampler_log_probs += part.rollouts.sampler_log_probs
        rollouts.finished += part.rollouts.finished
    return Scored(
        [row for part in parts for row in part.rows], rollouts, torch.cat([part.rewards for part in parts]), {}
    )


def same(count: int) -> int:
    """The agreement of a run with one process."""
    return count


class Sampler:
    """Draws prompts, completes them, scores them, and draws again for those that the algorithm does not keep."""

    def __init__(
        self, stream: PromptStream, engine: RolloutEngine, rewards: RewardSet, tokenizer: Any, spec: AlgorithmSpec, config: Any,
        params: SamplingParams,
    ) -> None:  # fmt: skip
        self.stream, self.engine, self.rewards, self.tokenizer = stream, engine, rewards, tokenizer
        self.spec, self.config, self.params = spec, config, params
        self.rounds = max(1, getattr(config, "max_resample_batches", 1))
        """Draws of a phase at most; algorithms that keep every prompt need one."""

    def sample(self, prompts: int, seed: int, agree: Callable[[int], int] = same) -> Scored:
        """`prompts` prompts with their scored completions. `agree` is the largest of a count over all processes: they draw in step,
        so that no prompt is drawn twice."""
        kept: list[Scored] = []
        dropped: list[Scored] = []
        drawn: list[Scored] = []
        have = total = 0
        while (missing := agree(prompts - have)) > 0 and len(drawn) < self.rounds:
            share = agree(round(1000 * have / total)) / 1000 if total else 1.0
            count = min(prompts, math.ceil(missing / max(share, LEAST_KEPT)))
            found = self.score(self.stream.draw(count), seed + 1_000_003 * len(drawn))
            keep = self.spec.keep_groups(fill_missing(found.rewards)[0], self.config).tolist()
            kept.append(found.take([at for at, good in enumerate(keep) if good]))
            dropped.append(found.take([at for at, good in enumerate(keep) if not good]))
            drawn.append(found)
            have, total = have + sum(keep), total + count
        whole = joined([*kept, *dropped]).take(range(prompts))  # prompts beyond those needed are left out
        whole.fillers = max(0, prompts - have)
        whole.metrics = phase_metrics([part.metrics for part in drawn], [len(part.rows) for part in drawn])
        if self.rounds > 1:
            whole.metrics |= {
                "dynamic_sampling/rounds": float(len(drawn)),
                "dynamic_sampling/kept_share": have / total,
                "dynamic_sampling/missing_share": whole.fillers / prompts,
            }
        return whole

    def score(self, rows: list[dict[str, Any]], seed: int) -> Scored:
        """Completions of these prompts and their rewards."""
        params = replace(self.params, seed=seed % 2**31)
        started = time.perf_counter()
        rollouts = self.engine.generate([row["prompt_ids"] for row in rows], params)
        generated = time.perf_counter()
        scores = self.rewards.score(
            *reward_arguments(rows, rollouts.completion_ids, self.tokenizer, params.num_generations)
        )
        metrics = scores.metrics | length_metrics(rollouts)
        metrics |= {"perf/rollout_seconds": generated - started, "perf/reward_seconds": time.perf_counter() - generated}
        totals = torch.tensor([float("nan") if total is None else total for total in scores.total])
        return Scored(rows, rollouts, totals.view(len(rows), params.num_generations), with_headline(metrics))


def reward_arguments(
    rows: Sequence[Mapping[str, Any]], completion_ids: Sequence[Sequence[int]], tokenizer: Any, group: int
) -> tuple[list[Any], list[str], dict[str, list[Any]], Sequence[Sequence[int]]]:
    """(prompts, completions, columns, completion ids) for `RewardSet.score`, one entry per completion. Prompts are what the
    dataset asked (messages, or text), not what the template made of it."""
    asked = [asked_of(row) for row in rows]
    prompts = [prompt for prompt in asked for _ in range(group)]
    names = [name for name in (rows[0] if rows else {}) if name not in PROMPT_COLUMNS]
    columns = {name: [row[name] for row in rows for _ in range(group)] for name in names}
    return prompts, tokenizer.batch_decode(completion_ids, skip_special_tokens=True), columns, completion_ids


def length_metrics(rollouts: Rollouts) -> dict[str, float]:
    """How long completions are, and which share did not end."""
    lengths = [len(ids) for ids in rollouts.completion_ids]
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/truncated_share": 1 - sum(rollouts.finished) / len(lengths),
    }


def phase_metrics(parts: Sequence[Mapping[str, float]], weights: Sequence[int]) -> dict[str, float]:
    """Metrics of several draws as those of one: extremes, sums of seconds, and means over the prompts (of those that measured)."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [(part[name], weight) for part, weight in zip(parts, weights, strict=True) if name in part]
        numbers = [value for value, _ in values]
        if name.endswith("min_length"):
            found[name] = min(numbers)
        elif name.endswith("max_length"):
            found[name] = max(numbers)
        elif name.endswith("_seconds"):
            found[name] = sum(numbers)
        else:
            found[name] = sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
    return found


def with_headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """`reward` is the weighted sum's mean: the headline of a run."""
    names = {"reward/mean": "reward", "reward/std": "reward_std", "reward/null": "reward_null"}
    return {names.get(name, name): value for name, value in metrics.items()}
