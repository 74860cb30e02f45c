"""Preference pairs as a trainer passes them on: lists of tokens until they are packed for a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aligntune.algorithms.batch import Normalizers, PairLogProbs
from aligntune.models.packed import PackedRows
from aligntune.trainers.filling import FILLS
from aligntune.trainers.passes import cut

REF_COLUMNS = ("ref_chosen", "ref_rejected")
"""Columns of precomputed reference log-probabilities, one number per token of the answer."""


@dataclass(frozen=True)
class Pairs:
    """B pairs as lists of tokens; `reference`: their log-probabilities under the reference, if computed before. Pairs that do not
    count only keep this process in step with others."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    reference: tuple[list[list[float]], list[list[float]]] | None = None
    counts: bool = True

    @classmethod
    def collate(cls, rows: Sequence[dict[str, Any]]) -> dict[str, Pairs]:
        """A micro-batch as the trainer passes it on: without the rows that only fill it up, or of nothing but one that does."""
        rows, filler = [row for row in rows if not row.get(FILLS)], rows[0]
        counts = bool(rows)
        rows = rows or [filler]
        lists = [[list(row[name]) for row in rows] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        known = all(name in rows[0] for name in REF_COLUMNS)
        reference = tuple([list(row[name]) for row in rows] for name in REF_COLUMNS) if known else None
        return {"pairs": cls(*lists, reference, counts)}  # type: ignore

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass reads."""
        return sum(2 * len(p) + len(c) + len(r) for p, c, r in zip(self.prompts, self.chosen, self.rejected))

    def pieces(self, limit: int | None, *, padded: bool = False) -> list[Pairs]:
        """These pairs in pieces of at most `limit` tokens each (see `passes.cut`); a pair stays whole."""
        chosen, rejected = (
            [len(prompt) + len(answer) for prompt, answer in zip(self.prompts, answers)]
            for answers in (self.chosen, self.rejected)
        )
        lengths = [2 * max(both) if padded else sum(both) for both in zip(chosen, rejected)]
        return [self.select(places) for places in cut(lengths, limit, padded=padded)]

    def select(self, places: Sequence[int]) -> Pairs:
        """The pairs at these places, in that order."""

        def at(lists: list[list[Any]]) -> list[list[Any]]:
            return [lists[place] for place in places]

        known = None if self.reference is None else (at(self.reference[0]), at(self.reference[1]))
        return Pairs(at(self.prompts), at(self.chosen), at(self.rejected), known, self.counts)

    def packed(self, device: torch.device) -> PackedRows:
        """2 B rows: the chosen sides, then the rejected ones. A prompt without tokens leaves its answer's first untrained."""
        rows, trained = [], []
        for answers in (self.chosen, self.rejected):
            rows += [[*prompt, *answer] for prompt, answer in zip(self.prompts, answers)]
            trained += [[False] * len(prompt) + [True] * len(answer) for prompt, answer in zip(self.prompts, answers)]
        return PackedRows.build(rows, trained, device)

    def known_reference(self, packed: PackedRows) -> Tensor | None:
        """`[M]` of the precomputed log-probabilities, in the order of `packed`'s trained tokens."""
        if self.reference is None:
            return None
        chosen, rejected = self.reference
        return torch.tensor(
            [x for side in (chosen, rejected) for row in side for x in row], device=packed.targets.device
        )


@dataclass(frozen=True)
class Step:
    """What a micro-batch must know of its optimiser batch; `first`: its first pair's place in `whole`."""

    totals: Normalizers
    whole: PairLogProbs | None = None
    first: int = 0
