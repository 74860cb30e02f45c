"""How do rows become a batch? Padded, or after one another without padding.

Both take rows with `input_ids` and `labels` (lists, arrays or tensors; other columns are left out). A padding-free or packed
batch has the loss and gradients of the padded batch of the same documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aligntune.data.masks import IGNORED


def round_up(length: int, multiple: int | None) -> int:
    """`length`, or the next multiple."""
    return length if not multiple else -(-length // multiple) * multiple


def pad(rows: Sequence[Any], value: int, multiple: int | None = None, side: str = "right") -> Tensor:
    """Rows of different length as one int64 tensor [rows, longest], filled with `value` on `side`."""
    width = round_up(max(len(row) for row in rows), multiple)
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for place, row in enumerate(rows):
        if side == "right":
            padded[place, : len(row)] = row
        else:
            padded[place, width - len(row) :] = row
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class PaddedCollator:
    """`input_ids`, `attention_mask` [B, T] and `labels` [B, T] (or [B] for one class a row)."""

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    padding_side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        ones = [np.ones(len(row), dtype=np.int64) for row in ids]
        labels = [row["labels"] for row in rows]
        return {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad(ones, 0),
            "labels": torch.as_tensor(labels) if np.ndim(labels[0]) == 0 else self._pad(labels, IGNORED),
        }

    def _pad(self, rows: Sequence[Any], value: int) -> Tensor:
        return pad(rows, value, self.pad_to_multiple_of, self.padding_side)


@dataclass(frozen=True)
class PackedCollator:
    """All documents of the batch after one another: `input_ids`, `labels`, `position_ids` [1, N].

    `position_ids` restart at each document (packed rows bring theirs). By them transformers' sdpa, eager and flex masks keep
    documents apart; there is no `attention_mask`, which would hide them. Varlen kernels get the boundaries as
    `cu_seq_lens_q/k` [documents + 1] (int32) and `max_length_q/k`, and short convolutions of linear-attention models
    `seq_idx` [1, N]. Padding to a multiple is one more document without labels.
    """

    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
        labels = np.concatenate([np.asarray(row["labels"], dtype=np.int64) for row in rows])
        positions = np.concatenate([_positions(row) for row in rows])
        extra = round_up(len(ids), self.pad_to_multiple_of) - len(ids)
        if extra:
            ids = np.concatenate([ids, np.full(extra, self.pad_token_id)])
            labels = np.concatenate([labels, np.full(extra, IGNORED)])
            positions = np.concatenate([positions, np.arange(extra)])
        starts = np.flatnonzero(positions == 0)
        labels[starts] = IGNORED
        bounds = np.append(starts, len(ids)).astype(np.int32)
        documents = np.repeat(np.arange(len(starts), dtype=np.int32), np.diff(bounds))
        boundaries, longest = torch.from_numpy(bounds), int(np.diff(bounds).max())
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(positions)[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": torch.from_numpy(documents)[None],
        }


@dataclass(frozen=True)
class PackedOrPaddedCollator(PaddedCollator):
    """Packed rows after one another, others padded: training and evaluation may differ in it."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        packed = "position_ids" in rows[0]
        return PackedCollator(self.pad_to_multiple_of)(rows) if packed else super().__call__(rows)


def _positions(row: Mapping[str, Any]) -> Any:
    if "position_ids" in row:
        return np.asarray(row["position_ids"], dtype=np.int64)
    return np.arange(len(row["input_ids"]))
