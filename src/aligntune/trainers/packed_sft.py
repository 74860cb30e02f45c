"""Supervised fine-tuning without padding and without a [tokens, vocabulary] tensor: the native SFT trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aligntune.data import PackedCollator
from aligntune.models.forward import packed_log_probs, packed_loss
from aligntune.models.packed import PackedRows
from aligntune.trainers.evaluating import LanguageModelEvaluation
from aligntune.trainers.filling import FillsLastBatch
from aligntune.trainers.length_groups import GroupsByLength
from aligntune.trainers.native import NativeTrainer
from aligntune.trainers.offloading import OffloadedActivations
from aligntune.trainers.parallel import AutocastLoss
from aligntune.trainers.passes import StepsInPieces, cut


class PackedSFTTrainer(
    StepsInPieces,
    OffloadedActivations,
    AutocastLoss,
    LanguageModelEvaluation,
    FillsLastBatch,
    GroupsByLength,
    NativeTrainer,
):
    """One padding-free pass for each piece of a micro-batch; the head on trained tokens only, chunk by chunk.

    The loss is summed over trained tokens and divided by their number in the whole optimiser batch, so that it depends
    neither on micro-batches and their pieces nor on packing. Batches are those of `PackedRowsCollator`.
    """

    def __init__(
        self, *args: Any, token_loss: Callable[[Tensor], Tensor] | None = None, micro_batch_tokens: int | None = None, **kwargs: Any
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.token_loss, self.micro_batch_tokens = token_loss, micro_batch_tokens
        self.model_accepts_loss_kwargs = True
        if token_loss is not None or self.args.label_smoothing_factor:
            self.token_nll = self._nll

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        pieces, evaluates = inputs.get("pieces", [inputs]), not self.model.training
        number = self._number(pieces, num_items_in_batch)
        passes = self.in_step(pieces) if evaluates else [(piece, True) for piece in pieces]
        loss = torch.stack([self.share(model, piece, number) * counts for piece, counts in passes]).sum()
        if evaluates:
            self.count_loss(model, inputs, loss)
        return (loss, {}) if return_outputs else loss

    def _number(self, pieces: Sequence[dict[str, Any]], total: Tensor | int | None) -> Tensor:
        """What a loss divides by: the trained tokens of the optimiser batch (averaged over processes), else of `pieces`."""
        number = sum(len(piece["rows"].targets) for piece in pieces) if total is None else total
        number = torch.as_tensor(number).clamp(min=1)
        averaged = total is not None and self.args.average_tokens_across_devices
        return number / self.accelerator.num_processes if averaged else number

    def share(self, model: Any, piece: dict[str, Any], number: Tensor | int) -> Tensor:
        rows, number = piece["rows"], torch.as_tensor(number)
        if self.token_loss is None:
            smoothing = self.args.label_smoothing_factor
            return packed_loss(model, rows, label_smoothing=smoothing, reduction="sum") / number
        return self.token_loss(packed_log_probs(model, rows).log_probs).sum() / number

    def _nll(self, model: Any, inputs: dict[str, Any]) -> Any:
        return sum(
            packed_loss(model, piece["rows"], reduction="sum") * counts
            for piece, counts in self.in_step(inputs["pieces"])
        )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None


@dataclass(frozen=True)
class PackedRowsCollator:
    """A batch: `pieces` of at most `micro_batch_tokens`, each with its `rows`; and `input_ids`, `labels` [1, T] of all for whoever counts tokens.

    Packed rows are cut between their documents. `padded`: the model reads rows padded to the longest of a piece.
    """

    pad_to_multiple_of: int | None = None
    micro_batch_tokens: int | None = None
    padded: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        join = PackedCollator(pad_to_multiple_of=self.pad_to_multiple_of)
        batch = join(rows)
        parts = [batch] if self.micro_batch_tokens is None else [join(piece) for piece in self._pieces(rows)]
        packed = [PackedRows.from_flat(part["input_ids"], part["position_ids"], part["labels"]) for part in parts]
        pieces = [{"rows": part} for part in packed]
        return {"pieces": pieces, "input_ids": batch["input_ids"], "labels": batch["labels"]}

    def _pieces(self, rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        documents = _documents(rows)
        lengths = [len(document["input_ids"]) for document in documents]
        return [[documents[at] for at in piece] for piece in cut(lengths, self.micro_batch_tokens, padded=self.padded)]


def _documents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of the rows attends to itself alone."""
    batch = PackedCollator()(rows)
    sizes = batch["cu_seq_lens_q"].diff().tolist()
    parts = zip(batch["input_ids"][0].split(sizes), batch["labels"][0].split(sizes), strict=True)
    return [{"input_ids": ids, "labels": labels} for ids, labels in parts]
