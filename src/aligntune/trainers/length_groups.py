"""Batches of rows of like length, in an order that a seed decides alone.

transformers' own grouping draws from the global random state: `data_seed` does not reach it, and a resumed run sees other
batches than an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Sampler

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

STRETCH = 50
"""Batches' worth of shuffled rows that are sorted among themselves."""


class LengthGroups(Sampler[int]):
    """All rows once an epoch: shuffled, sorted by length within stretches, cut into batches whose order is shuffled.

    The batch with the longest row comes first, so that running out of memory shows at once. `set_epoch` gives each pass
    its own order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = draw.sample(range(len(self.lengths)), len(self.lengths))
        size = STRETCH * self.batch
        stretches = [
            sorted(order[at : at + size], key=self.lengths.__getitem__, reverse=True)
            for at in range(0, len(order), size)
        ]
        batches = [stretch[at : at + self.batch] for stretch in stretches for at in range(0, len(stretch), self.batch)]
        whole = [batch for batch in batches if len(batch) == self.batch]
        part = [batch for batch in batches if len(batch) < self.batch]  # at most one, and last, so that no other is cut
        draw.shuffle(whole)
        longest = max(range(len(whole)), key=lambda at: self.lengths[whole[at][0]], default=0)
        whole[:1], whole[longest : longest + 1] = whole[longest : longest + 1], whole[:1]
        return iter([row for batch in [*whole, *part] for row in batch])


class GroupsByLength(_Base):
    """Mixin: `train_sampling_strategy: group_by_length` by `LengthGroups`."""

    def _get_train_sampler(self, *given: Any) -> Any:
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(*given)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows: Any = self.train_dataset  # with its lengths, which those given may have lost as unused
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGroups(rows[args.length_column_name][:], batch, seed)
