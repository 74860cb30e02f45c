"""How good is a reward model on rows it does not train on? Its own scores of them, against labels or against each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aligntune.rewards.model import RewardModel
from aligntune.trainers.reward_trainer import pair_losses


class HeldTexts:
    """`rank_correlation` (Spearman) and `mse` against the labels, in the reward's units; `loss` is the standardised mse."""

    names = ("loss", "mse", "rank_correlation")

    def __init__(self, judge: RewardModel, texts: Sequence[str], labels: Sequence[float], std: float) -> None:
        self.judge, self.texts, self.labels, self.std = judge, list(texts), list(labels), std

    def __call__(self) -> dict[str, float]:
        scores = self.judge([""] * len(self.texts), self.texts)
        errors = [(score - label) ** 2 for score, label in zip(scores, self.labels, strict=True)]
        mse = math.fsum(errors) / len(errors)
        return {"loss": mse / self.std**2, "mse": mse, "rank_correlation": rank_correlation(scores, self.labels)}


class HeldPairs:
    """`accuracy`: share of pairs with chosen above rejected (equal scores count half); `margin`: mean difference; `loss`."""

    names = ("loss", "accuracy", "margin")

    def __init__(self, judge: RewardModel, rows: Sequence[Mapping[str, Any]], centering: float = 0.0) -> None:
        self.judge, self.rows, self.centering = judge, list(rows), centering

    def __call__(self) -> dict[str, float]:
        prompts = [row["prompt"] for row in self.rows]
        chosen, rejected = (self.judge(prompts, [row[side] for row in self.rows]) for side in ("chosen", "rejected"))
        leads = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(rejected, dtype=torch.float64)
        margins = torch.tensor([row.get("margin") or 0.0 for row in self.rows], dtype=torch.float64)
        losses = pair_losses(torch.tensor([*chosen, *rejected], dtype=torch.float64), margins, self.centering)
        accuracy = (leads > 0).double().mean() + (leads == 0).double().mean() / 2
        return {"loss": float(losses.mean()), "accuracy": float(accuracy), "margin": float(leads.mean())}


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: Pearson correlation of the ranks, ties at their mean rank. NaN when either side is constant."""
    x, y = (torch.tensor(_ranks(values), dtype=torch.float64) for values in (one, other))
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    counts, ranks, below = Counter(values), {}, 0
    for value in sorted(counts):
        ranks[value] = below + (counts[value] - 1) / 2
        below += counts[value]
    return [ranks[value] for value in values]
