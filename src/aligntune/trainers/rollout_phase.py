"""The rollout phase: prompts in order, completions from the policy, and their rewards.

Dynamic sampling: prompts that the algorithm does not keep are replaced by others, at most `max_resample_batches` times. What is
missing then is filled with dropped ones, which are not counted. Several processes draw and keep what one would, and deal it out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.data.pairs import PROMPT_COLUMNS, asked_of
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import RolloutEngine, Rollouts, SamplingParams
from aligntune.trainers.online_metrics import pooled
from aligntune.trainers.prompt_stream import PromptStream

LEAST_KEPT = Fraction(1, 4)
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


Gather = Callable[[list[Any]], list[Any]]
"""From this process's records to those of all processes; every process must call it."""


Mark = tuple[bool, int]
"""Of a drawn prompt: whether it was dropped, and its place in the order drawn, over all processes."""


def draw_size(missing: int, kept: int, drawn: int, most: int) -> int:
    """How many prompts to draw when `missing` are needed and `kept` of `drawn` were kept so far; at most `most`."""
    share = Fraction(kept, drawn) if drawn else Fraction(1)
    return min(most, math.ceil(missing / max(share, LEAST_KEPT)))


def deal(mine: Scored, own: list[Mark], taken: list[Mark], rank: int, world: int, gather: Gather) -> Scored:
    """This process's part of the prompts `taken` from all; `mine` and its marks `own`: those that it drew."""
    wanted = set(taken)
    records = gather([(mark, mine.take([at])) for at, mark in enumerate(own) if mark in wanted])
    by_mark = dict(records)
    return joined([by_mark[mark] for mark in taken[rank::world]])


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

    def sample(self, prompts: int, seed: int, gather: Gather = list) -> Scored:
        """`prompts` prompts for this process, with their scored completions.

        All processes together draw, keep and drop as one process that wants as many prompts: a place in the order of what was
        drawn is kept or not whoever has it, and of those that are taken each process gets every `world`-th.
        """
        world, rank = self.stream.world, self.stream.rank
        wanted = prompts * world
        drawn: list[Scored] = []
        marks: list[Mark] = []
        own: list[Mark] = []
        have = 0
        while have < wanted and len(drawn) < self.rounds:
            count, before = draw_size(wanted - have, have, len(marks), wanted), len(marks)
            found = self.score(self.stream.draw(count), seed + 1_000_003 * len(drawn))
            keep = self.spec.keep_groups(found.rewards, self.config).tolist()
            own += [(not good, before + rank + world * at) for at, good in enumerate(keep)]
            drawn.append(found)
            marks = gather(own)
            have = sum(not dropped for dropped, _ in marks)
        taken = sorted(marks)[:wanted]  # kept ones first, each in the order drawn; what is beyond is left out
        mine = joined(drawn)
        if have < len(marks):
            mine = deal(mine, own, taken, rank, world, gather)
        mine.fillers = sum(dropped for dropped, _ in taken[rank::world])
        counts = [len(part.rows) for part in drawn]
        parts = gather([(pooled([part.metrics for part in drawn], counts), sum(counts))])
        mine.metrics = pooled([metrics for metrics, _ in parts], [count for _, count in parts], at_once=True)
        if self.rounds > 1:
            mine.metrics |= {
                "dynamic_sampling/rounds": float(len(drawn)),
                "dynamic_sampling/kept_share": have / len(marks),
                "dynamic_sampling/missing_share": max(0, wanted - have) / wanted,
            }
        return mine

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
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True) if completion_ids else []
    return prompts, texts, columns, completion_ids


def length_metrics(rollouts: Rollouts) -> dict[str, float]:
    """How long completions are, and which share did not end; nothing when there are none."""
    lengths = [len(ids) for ids in rollouts.completion_ids]
    if not lengths:
        return {}
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/truncated_share": 1 - sum(rollouts.finished) / len(lengths),
    }


def with_headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """`reward` is the weighted sum's mean: the headline of a run."""
    names = {"reward/mean": "reward", "reward/std": "reward_std", "reward/null": "reward_null"}
    return {names.get(name, name): value for name, value in metrics.items()}
