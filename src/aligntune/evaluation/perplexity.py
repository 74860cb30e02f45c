"""How surprised is the model by the text? Perplexity that does not depend on how rows are batched.

Sums of negative log-likelihood and token counts are kept and divided once: the mean over tokens, where a mean of batch
means would weigh short batches too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aligntune.data.masks import IGNORED
from aligntune.models.forward import input_device, packed_loss
from aligntune.models.modes import evaluating
from aligntune.models.packed import PackedRows


@dataclass(frozen=True)
class TokenLoss:
    """Summed negative log-likelihood, in nats, of so many tokens. Add them over batches and processes."""

    nll: float = 0.0
    tokens: int = 0

    def __add__(self, other: TokenLoss) -> TokenLoss:
        return TokenLoss(self.nll + other.nll, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Nats per token; nan without tokens."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of `mean`, at most 1e304 (a diverged model stays a number that JSON can hold)."""
        return math.exp(min(self.mean, 700.0))


def row_losses(
    model: Any, row: Callable[[int], Mapping[str, Sequence[int]]], lengths: Sequence[int], *, batch_size: int = 8
) -> list[TokenLoss]:
    """The loss of each row by itself, in their order. Like `lengths` go together, without padding; `row` gives one by its place."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found = [TokenLoss()] * len(lengths)
    with evaluating(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for at, loss in zip(chosen, _split_loss(model, [row(at) for at in chosen]), strict=True):
                found[at] = loss
    return found


def _split_loss(model: Any, rows: Sequence[Mapping[str, Sequence[int]]]) -> list[TokenLoss]:
    trained = [[label != IGNORED for label in row["labels"]] for row in rows]
    packed = PackedRows.build([list(row["input_ids"]) for row in rows], trained, input_device(model))
    if not sum(packed.counts):
        return [TokenLoss()] * len(rows)
    parts = packed_loss(model, packed, reduction="none").double().split(list(packed.counts))
    return [TokenLoss(float(part.sum()), len(part)) for part in parts]
