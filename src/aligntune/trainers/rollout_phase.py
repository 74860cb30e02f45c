"""The rollout phase: prompts in order, completions from the policy, their rewards and advantages.

A phase yields one `Rollout`: everything about B = P * G completions (those of a prompt are neighbours) that the updates
need. It lives on the CPU as plain lists and float tensors, so that a checkpoint can hold it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import RolloutEngine, Rollouts, SamplingParams

NOT_COLUMNS = ("prompt_ids", "prompt_text", "length", "prompt")


@dataclass
class Rollout:
    """One phase on this process. Log-probabilities are those of the tempered distribution, [B, T], zero where padded."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    ended: Tensor
    """[B] whether the stop token came."""
    loss_mask: Tensor
    """[B, T] tokens that carry loss."""
    rewards: Tensor
    """[P, G]"""
    advantages: Tensor
    """[B] or [B, T]"""
    sampler_log_probs: Tensor
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completion_ids)


class PromptStream:
    """Prompts without end, a new order each pass, as a function of the seed and the position alone.

    `rank` of `world` takes every `world`-th prompt. `group_by_length`: prompts of like length follow each other.
    """

    def __init__(self, rows: Any, *, seed: int, rank: int = 0, world: int = 1, group: int = 0) -> None:
        self.rows, self.seed, self.rank, self.world, self.group = rows, seed, rank, world, group
        self.position = 0
        """Prompts drawn so far, over all processes."""
        self._orders: dict[int, np.ndarray] = {}

    @property
    def epoch(self) -> float:
        return self.position / len(self.rows)

    def draw(self, count: int) -> list[dict[str, Any]]:
        """The next `count` prompts of this process; the others draw as many."""
        places = [self.position + self.rank + self.world * at for at in range(count)]
        self.position += self.world * count
        return [self.rows[int(self.order(place // len(self.rows))[place % len(self.rows)])] for place in places]

    def order(self, epoch: int) -> np.ndarray:
        """The prompts' places in this pass."""
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            if self.group:
                lengths = np.asarray(self.rows.with_format("numpy")["length"][:])
                stretches = [order[start : start + self.group] for start in range(0, len(order), self.group)]
                order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in stretches])
            self._orders = {epoch: order}
        return self._orders[epoch]


@dataclass
class Scored:
    """Prompts with their completions and rewards, before anything is dropped."""

    rows: list[dict[str, Any]]
    rollouts: Rollouts
    rewards: Tensor
    """[P, G], NaN where no reward applied."""
    metrics: dict[str, float]

    def take(self, keep: Sequence[int], group: int) -> Scored:
        """The prompts `keep` alone."""
        at = [prompt * group + member for prompt in keep for member in range(group)]
        found = self.rollouts
        rollouts = Rollouts(
            [found.completion_ids[i] for i in at],
            None if found.log_probs is None else [found.log_probs[i] for i in at],
            [found.sampler_log_probs[i] for i in at],
            [found.finished[i] for i in at],
        )
        return Scored([self.rows[prompt] for prompt in keep], rollouts, self.rewards[list(keep)], self.metrics)


def concatenated(parts: Sequence[Scored]) -> Scored:
    """Several draws as one; metrics are averaged by prompts."""
    rollouts = Rollouts([], [], [], [])
    for part in parts:
        rollouts.completion_ids += part.rollouts.completion_ids
        rollouts.log_probs = (rollouts.log_probs or []) + (part.rollouts.log_probs or [])
        rollouts.sampler_log_probs += part.rollouts.sampler_log_probs
        rollouts.finished += part.rollouts.finished
    return Scored([row for part in parts for row in part.rows], rollouts, torch.cat([part.rewards for part in parts]), parts[-1].metrics)


class Sampler:
    """Draws prompts, completes them, scores them, and draws again for prompts that the algorithm does not keep."""

    def __init__(
        self, stream: PromptStream, engine: RolloutEngine, rewards: RewardSet, tokenizer: Any, spec: AlgorithmSpec, config: Any,
        params: SamplingParams,
    ) -> None:  # fmt: skip
        self.stream, self.engine, self.rewards, self.tokenizer = stream, engine, rewards, tokenizer
        self.spec, self.config, self.params = spec, config, params

    def sample(self, prompts: int, seed: int) -> Scored:
        """`prompts` prompts with their scored completions.

        Dynamic sampling: prompts that the algorithm drops are replaced by others, at most `max_resample_batches` times; what
        is then missing is filled with dropped ones, which have no gradient.
        """
        group = self.params.num_generations
        kept: list[Scored] = []
        dropped: list[Scored] = []
        have = drawn = rounds = 0
        limit = getattr(self.config, "max_resample_batches", 1)
        while have < prompts and rounds < max(1, limit):
            found = self._score(self.stream.draw(prompts - have), seed + 1_000_003 * rounds)
            keep = self.spec.keep_groups(torch.nan_to_num(found.rewards), self.config).tolist()
            kept.append(found.take([i for i, good in enumerate(keep) if good], group))
            dropped.append(found.take([i for i, good in enumerate(keep) if not good], group))
            have, drawn, rounds = have + sum(keep), drawn + len(keep), rounds + 1
        metrics = found.metrics
        if rounds > 1 or have < prompts:
            metrics = metrics | {"dynamic_sampling/rounds": float(rounds), "dynamic_sampling/kept_share": have / drawn}
        whole = concatenated(kept)
        if have < prompts:
            filler = concatenated(dropped)
            whole = concatenated([whole, filler.take(range(prompts - have), group)])
        whole.metrics = metrics
        return whole

    def _score(self, rows: list[dict[str, Any]], seed: int) -> Scored:
        group = self.params.num_generations
        started = time.perf_counter()
        rollouts = self.engine.generate([row["prompt_ids"] for row in rows], _with_seed(self.params, seed))
        generated = time.perf_counter()
        scores = self.rewards.score(*reward_arguments(rows, rollouts.completion_ids, self.tokenizer, group))
        scored = time.perf_counter()
        tokens = sum(map(len, rollouts.completion_ids))
        lengths = torch.tensor([len(ids) for ids in rollouts.completion_ids], dtype=torch.float)
        metrics = scores.metrics | {
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/truncated_share": 1 - sum(rollouts.finished) / len(rollouts.finished),
            "perf/rollout_tokens_per_second": tokens / max(generated - started, 1e-9),
            "perf/rollout_seconds": generated - started,
            "perf/reward_seconds": scored - generated,
        }
        totals = torch.tensor([float("nan") if total is None else total for total in scores.total])
        return Scored(rows, rollouts, totals.view(len(rows), group), metrics)


def reward_arguments(
    rows: Sequence[Mapping[str, Any]], completion_ids: Sequence[Sequence[int]], tokenizer: Any, group: int
) -> tuple[list[Any], list[str], dict[str, list[Any]], Sequence[Sequence[int]]]:
    """(prompts, completions, columns, completion ids) for `RewardSet.score`, one entry per completion."""
    repeated = [row for row in rows for _ in range(group)]
    prompts = [row.get("prompt", row["prompt_text"]) for row in repeated]
    names = [name for name in (rows[0] if rows else {}) if name not in NOT_COLUMNS]
    columns = {name: [row[name] for row in repeated] for name in names}
    return prompts, tokenizer.batch_decode(completion_ids, skip_special_tokens=True), columns, completion_ids


def padded(values: Sequence[Sequence[float]]) -> Tensor:
    """Lists of different length as [B, T] float32, zero on the right."""
    width = max(map(len, values))
    return torch.tensor([[*row, *([0.0] * (width - len(row)))] for row in values])


def length_mask(completion_ids: Sequence[Sequence[int]]) -> Tensor:
    """[B, T], true where there is a token."""
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    return torch.arange(int(lengths.max()))[None] < lengths[:, None]


def fill_missing(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """[P, G] rewards without NaN (a missing one gets its group's mean, 0 where all are missing), and where they were [P, G]."""
    missing = rewards.isnan()
    means = rewards.nanmean(1, keepdim=True).nan_to_num(0.0)
    return torch.where(missing, means, rewards), missing


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return replace(params, seed=seed % 2**31)
