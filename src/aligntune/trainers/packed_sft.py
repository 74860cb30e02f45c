"""Supervised fine-tuning without padding and without a [tokens, vocabulary] tensor: the native SFT trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from aligntune.algorithms.sft import supervised_loss
from aligntune.data import PackedCollator
from aligntune.models.forward import packed_log_probs, packed_loss
from aligntune.models.packed import PackedRows
from aligntune.trainers.evaluating import LanguageModelEvaluation
from aligntune.trainers.offloading import OffloadedActivations
from aligntune.trainers.parallel import AutocastLoss
from aligntune.trainers.prefetching import PrefetchesBatches


class PackedSFTTrainer(PrefetchesBatches, OffloadedActivations, AutocastLoss, LanguageModelEvaluation, Trainer):
    """One padding-free forward a micro-batch; the head on trained tokens only, chunk by chunk.

    The loss is summed over trained tokens and divided by their number in the whole optimiser batch, so that it depends
    neither on micro-batches nor on packing. Batches are those of `PackedRowsCollator`.
    """

    def __init__(self, *args: Any, loss_type: str = "nll", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_type = loss_type
        self.model_accepts_loss_kwargs = True
        if loss_type != "nll" or self.args.label_smoothing_factor:
            self.token_nll = lambda model, inputs: packed_loss(model, inputs["rows"], reduction="sum")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = self._loss(model, inputs["rows"], num_items_in_batch)
        if not self.model.training:
            self.count_loss(model, inputs, loss)
        return (loss, {}) if return_outputs else loss

    def _loss(self, model: Any, rows: PackedRows, total: Tensor | int | None) -> Tensor:
        number = torch.as_tensor(len(rows.targets) if total is None else total).clamp(min=1)
        if total is not None and self.args.average_tokens_across_devices:
            number = number / self.accelerator.num_processes
        if self.loss_type == "nll":
            smoothing = self.args.label_smoothing_factor
            return packed_loss(model, rows, label_smoothing=smoothing, reduction="sum") / number
        log_probs = packed_log_probs(model, rows).log_probs
        return supervised_loss(self.loss_type, log_probs, torch.ones_like(log_probs), number)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None


@dataclass(frozen=True)
class PackedRowsCollator:
    """A batch: `rows`, laid out while the device still computes the last step, and `input_ids`, `labels` [1, T] for whoever
    counts tokens."""

    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = PackedCollator(pad_to_multiple_of=self.pad_to_multiple_of)(rows)
        packed = PackedRows.from_flat(batch["input_ids"], batch["position_ids"], batch["labels"])
        return {"rows": packed, "input_ids": batch["input_ids"], "labels": batch["labels"]}
