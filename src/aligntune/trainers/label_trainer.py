"""The trainer of classifiers: one loss for both tasks, exact under any batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aligntune.trainers.evaluating import LanguageModelEvaluation
from aligntune.trainers.filling import FillsLastBatch
from aligntune.trainers.length_groups import GroupsByLength
from aligntune.trainers.native import NativeTrainer
from aligntune.trainers.passes import StepsInPieces


class ClassificationTrainer(StepsInPieces, LanguageModelEvaluation, FillsLastBatch, GroupsByLength, NativeTrainer):
    """Cross-entropy summed over the labels of a batch, divided by the number of labels in the whole optimiser batch.

    An evaluation gives the class of each text or token and its probability, `[B]` or `[B, T]`; its loss is the mean over all
    labels.
    """

    with_perplexity = False

    def __init__(self, *args: Any, micro_batch_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_batch_tokens = micro_batch_tokens
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        logits, total = self._total(model, inputs)
        count = (labels != -100).sum()
        if not self.model.training:
            self._sums = self._sums + torch.stack([total, total, count.to(total.dtype)]).detach().double()
        given = count if num_items_in_batch is None else num_items_in_batch
        number = torch.as_tensor(given, device=total.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            number = number / self.accelerator.num_processes
        loss = total / number
        return (loss, said(logits)) if return_outputs else loss

    def share(self, model: Any, piece: dict[str, Any], number: Tensor | int) -> Tensor:
        return self._total(model, piece)[1] / number

    def _total(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits `[B, C]` or `[B, T, C]`, and the sum of their losses."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
        smoothing, labels = self.args.label_smoothing_factor, inputs["labels"].flatten()
        return logits, functional.cross_entropy(
            logits.flatten(0, -2), labels, reduction="sum", label_smoothing=smoothing
        )


def said(logits: Tensor) -> dict[str, Tensor]:
    """What an evaluation keeps of the logits: all of them, of many rows and classes, would fill the memory."""
    probability, guess = logits.softmax(-1).max(-1)
    return {"guess": guess, "probability": probability}
