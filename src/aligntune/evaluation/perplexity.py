"""How surprised is the model by the text? Perplexity that does not depend on how rows are batched.

Sums of negative log-likelihood and token counts are kept and divided once: the mean over tokens, where a mean of batch
means would weigh short batches too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aligntune.errors import DataError
from aligntune.models.forward import input_device, packed_loss
from aligntune.models.modes import evaluating
from aligntune.models.packed import PackedRows

if TYPE_CHECKING:
    pass

IGNORED = -100
_CHUNK = 2048
"""Positions whose float32 logits exist at a time."""


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


def token_loss(logits: Tensor, labels: Tensor) -> TokenLoss:
    """Loss of a batch: `logits` [..., T, V] predict the next tokens of `labels` [..., T] (-100: not counted).

    In a packed row the first label of each document must be -100.
    """
    targets = labels[..., 1:]
    places = (targets != IGNORED).nonzero(as_tuple=True)
    scores, wanted = logits[..., :-1, :], targets[places]
    total = 0.0
    for start in range(0, len(wanted), _CHUNK):
        part = tuple(index[start : start + _CHUNK] for index in places)
        nll = nn.functional.cross_entropy(scores[part].float(), wanted[start : start + _CHUNK], reduction="none")
        total += float(nll.double().sum())
    return TokenLoss(total, len(wanted))


def evaluate_loss(
    model: Any, rows: Sequence[Mapping[str, Sequence[int]]], *, batch_size: int = 8, packed: bool = False
) -> TokenLoss:
    """Loss of tokenised rows (`input_ids` and `labels` of equal length), the same for every batch size and packing.

    `packed` runs the rows of a batch as one sequence without padding and never builds their logits.
    """
    if not rows:
        raise DataError("there are no rows to take the perplexity of")
    total = TokenLoss()
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = [rows[at] for at in range(start, min(start + batch_size, len(rows)))]
            total += sum(_split_loss(model, batch), TokenLoss()) if packed else _padded_loss(model, batch)
    if not total.tokens:
        raise DataError("no token of the evaluation rows has a label: there is nothing to take the perplexity of")
    return total


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


def _padded_loss(model: Any, rows: Sequence[Mapping[str, Sequence[int]]]) -> TokenLoss:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        values = [[*row[name], *[fill] * (width - len(row[name]))] for row in rows]
        return torch.tensor(values, device=input_device(model))

    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=input_device(model))
    mask = (torch.arange(width, device=input_device(model)) < lengths[:, None]).long()
    output = model(input_ids=padded("input_ids", 0), attention_mask=mask, use_cache=False)
    return token_loss(output.logits, padded("labels", IGNORED))
