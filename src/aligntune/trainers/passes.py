"""How is a micro-batch trained on in passes of bounded size? Cut by token count; the shares of the loss add up.

A pass is one forward and backward pass over a piece of the micro-batch. Losses divide by counts of the whole optimiser batch,
so that cutting changes memory and speed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from aligntune.algorithms.batch import Loss
from aligntune.trainers.parallel import largest_of_all

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

Piece = TypeVar("Piece")


def cut(lengths: Sequence[int], limit: int | None, *, padded: bool = False) -> list[list[int]]:
    """Places of all rows in few pieces of near equal size, of at most `limit` tokens each (None: one piece). No rows
    are one piece, too.

    A row longer than `limit` is a piece of its own. `padded`: the tokens of a piece are its rows times its longest. Places
    ascend within a piece, and pieces are in the order of their first places.

    First-fit decreasing gives the number of pieces; the least limit that it meets with as many balances them (MULTIFIT, Coffman,
    Garey and Johnson 1978).
    """
    if limit is None or not lengths:
        return [list(range(len(lengths)))]
    pieces = _filled(lengths, limit, padded)
    least, most = max((length for length in lengths if length <= limit), default=limit), limit
    while len(pieces) > 1 and least < most:
        middle = (least + most) // 2
        found = _filled(lengths, middle, padded)
        if len(found) <= len(pieces):
            pieces, most = found, middle
        else:
            least = middle + 1
    return sorted(sorted(piece) for piece in pieces)


def _filled(lengths: Sequence[int], limit: int, padded: bool) -> list[list[int]]:
    """First-fit decreasing: each row, the longest first, goes into the first piece that has room."""
    pieces: list[list[int]] = []
    tokens: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        for at, piece in enumerate(pieces):
            whole = lengths[piece[0]] * (len(piece) + 1) if padded else tokens[at] + lengths[place]
            if whole <= limit:
                piece.append(place)
                tokens[at] = whole
                break
        else:
            pieces.append([place])
            tokens.append(lengths[place])
    return pieces


class BoundedPasses(_Base):
    """Mixin for trainers that cut their micro-batches: keeps processes in step and synchronises gradients once."""

    micro_batch_tokens: int | None = None
    """Most tokens of a pass; None: a micro-batch is one pass."""

    def passes(self, model: nn.Module, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, bool]]:
        """Each piece of a micro-batch, to be run forward and backward, and whether it counts (see `in_step`).

        DDP reduces gradients in the last pass. FSDP does in each, or it would keep whole gradients in between.
        """
        steps = [(piece, True) for piece in pieces] if self.micro_batch_tokens is None else self.in_step(pieces)
        for place, (piece, counts) in enumerate(steps, 1):
            waits = place < len(steps) and not self.is_fsdp_enabled
            with self.accelerator.no_sync(model) if waits else nullcontext(), nullcontext() if counts else idle(model):
                yield piece, counts

    def in_step(self, pieces: Sequence[Piece]) -> list[tuple[Piece, bool]]:
        """The pieces, and whether each counts. Under FSDP all processes run the model equally often: those with fewer pieces
        repeat their last, whose loss must be multiplied by 0."""
        found = [(piece, True) for piece in pieces]
        if self.is_fsdp_enabled:
            found += [(pieces[-1], False)] * (self.agree(len(pieces)) - len(pieces))
        return found

    def agree(self, count: int) -> int:
        """The largest count of any process."""
        return int(largest_of_all(count, self.args.device))


class SharesInPieces(BoundedPasses):
    """Mixin for trainers with a training step of their own, whose losses are shares of the optimiser batch with metrics."""

    def train_on(
        self, model: nn.Module, pieces: Sequence[Piece], loss_of: Callable[[Piece], Loss]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Forward and backward of each piece; the sum of the losses, times the number of processes, and the metrics of each."""
        processes, values, metrics = self.accelerator.num_processes, [], []
        scale = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        for piece, counts in self.passes(model, pieces):
            with self.compute_loss_context_manager():
                loss = loss_of(piece)
            value = loss.value * processes * counts
            self.accelerator.backward(value, **scale)
            values.append(value.detach())
            if counts:
                metrics.append(loss.metrics)
        return torch.stack(values).sum(), metrics


class StepsInPieces(BoundedPasses):
    """Mixin for trainers with transformers' own training step, whose batches hold `pieces` (missing: they are one)."""

    def share(self, model: Any, piece: dict[str, Any], number: Tensor | int) -> Tensor:
        """The loss of a piece, summed and divided by `number`."""
        raise NotImplementedError

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of each piece; the sum of their shares of the loss."""
        shares = []
        for piece, counts in self.passes(model, inputs.get("pieces", [inputs])):
            if counts:
                shares.append(super().training_step(model, piece, num_items_in_batch))
            else:
                with self.compute_loss_context_manager():
                    nothing = 0 * self.share(model, piece, 1)
                self.accelerator.backward(nothing)
        return torch.stack(shares).sum()


@contextmanager
def idle(model: nn.Module) -> Iterator[None]:
    """For a pass that does not count: no dropout is drawn, and nobody takes its tokens for trained ones."""
    training: Any = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
