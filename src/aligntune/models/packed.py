"""How do rows of different length become one forward pass without padding?

`PackedRows` puts the rows one after another into `[1, T]`, remembers where each begins, which positions predict a
trained token, and how to lay per-token results out as `[B, L]` again. Everything is built on the CPU from lists and
moved in one go, so that a step waits for the device nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aligntune.data.masks import IGNORED

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PackedRows:
    """B rows of T tokens together, M of which are trained (have their log-probability taken).

    input_ids, position_ids: `[1, T]`; positions count from 0 in every row.
    cu_seqlens: `[B + 1]` int32, where each row begins, and T.
    predictors: `[M]`, places in `[0, T)` whose hidden state predicts a trained token, in order.
    targets: `[M]`, those tokens.
    counts: trained tokens of each row; they sum to M.
    cells: `[M]`, where each trained token goes in a flattened `[B, max(counts)]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_length: int
    predictors: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    cells: Tensor

    @classmethod
    def build(
        cls, rows: Sequence[Sequence[int]], trained: Sequence[Sequence[bool]], device: torch.device | str = "cpu"
    ) -> PackedRows:
        """From token rows and, for each token, whether it is trained. The first token of a row has no predictor: it
        cannot be trained and its flag is ignored."""
        if any(len(row) == 0 for row in rows):
            raise ValueError("an empty row cannot be packed")
        lengths = np.array([len(row) for row in rows])
        ids = np.array([token for row in rows for token in row])
        flags = np.array([bool(flag) for row in trained for flag in row])
        if flags.shape != ids.shape:
            raise ValueError(f"{len(flags)} flags for {len(ids)} tokens")
        return cls._from_flat(ids, flags, np.cumsum(lengths) - lengths, torch.device(device))

    @classmethod
    def from_completions(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> PackedRows:
        """From prompts (at least one token each) and their completions, which are trained."""
        pairs = list(zip(prompts, completions, strict=True))
        rows = [[*prompt, *completion] for prompt, completion in pairs]
        if any(not prompt for prompt, _ in pairs):
            raise ValueError("a prompt without tokens cannot predict the first token of its completion")
        return cls.build(rows, [[False] * len(p) + [True] * len(c) for p, c in pairs], device)

    @classmethod
    def from_flat(
        cls,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
    ) -> PackedRows:
        """From a collator's `[1, T]` (or `[T]`) tensors: a row begins wherever the position is 0; `labels` stand at
        their own token, not shifted, -100 where it is not trained. On CUDA tensors this waits for the device."""
        ids, positions, targets = (tensor.flatten().numpy(force=True) for tensor in (input_ids, position_ids, labels))
        if positions[0] != 0:
            raise ValueError("packed positions must start at 0")
        starts = np.flatnonzero(positions == 0)
        return cls._from_flat(ids, targets != IGNORED, starts, input_ids.device)

    @classmethod
    def _from_flat(cls, ids: Array, flags: Array, starts: Array, device: torch.device) -> PackedRows:
        """In NumPy: torch would wake its threads for each of these small operations, 47 ms a batch on a host of 32 cores."""
        flags = flags.copy()
        flags[starts] = False
        bounds = np.append(starts, len(ids))
        lengths = np.diff(bounds)
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        trained = np.flatnonzero(flags)
        rows = row_of[trained]
        counts = np.bincount(rows, minlength=len(lengths))
        within = np.arange(len(trained)) - (np.cumsum(counts) - counts)[rows]
        arrays = {
            "input_ids": ids[None],
            "position_ids": (np.arange(len(ids)) - starts[row_of])[None],
            "cu_seqlens": bounds.astype(np.int32),
            "predictors": trained - 1,
            "targets": ids[trained],
            "cells": rows * counts.max() + within,
        }
        moved = {name: _move(torch.from_numpy(array), device) for name, array in arrays.items()}
        return cls(**moved, max_length=int(lengths.max()), counts=tuple(counts.tolist()))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRows:
        """The same rows on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> PackedRows:
        """The same rows in page-locked memory, from which a device can copy while it computes."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedRows:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(x) if isinstance(x, Tensor) else x for name, x in values.items()}
        return PackedRows(**changed)

    @property
    def no_mask(self) -> Tensor:
        """`[1, 1, 1, 1]`, true: stands in for an attention mask where the boundaries say it all."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device)

    def __len__(self) -> int:
        return len(self.counts)

    def padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """`[M]` values of the trained tokens as `[B, max(counts)]`, each row's from the left."""
        width = max(self.counts, default=0)
        flat = values.new_full((len(self) * width,), fill)
        return flat.index_copy(0, self.cells, values).view(len(self), width)

    def mask(self) -> Tensor:
        """`[B, max(counts)]`, true where `padded` holds a trained token."""
        return self.padded(torch.ones_like(self.targets, dtype=torch.bool), fill=False)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
