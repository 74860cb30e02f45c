"""How does a reward model learn and how is it measured while it does? One loss per row, summed over the optimiser batch.

Losses are divided by the rows of the whole optimiser batch, so that a step of 8 rows is the same step however it is cut:
2 x 4, or 5 and a last short micro-batch of 3, or passes of so many tokens. An evaluation is the model scoring the rows held out, as it will score later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from aligntune.models.modes import evaluating
from aligntune.trainers.native import NativeTrainer
from aligntune.trainers.passes import StepsInPieces, cut

RowLosses = Callable[[Tensor, Tensor], Tensor]
"""(scores [B] or [2B], labels [B]) -> losses [B]."""


def text_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the scores [B] against standardised labels [B]."""
    return (scores - labels).square()


def pair_losses(scores: Tensor, margins: Tensor, centering: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2 for each of B pairs.

    `scores` [2B]: all chosen before all rejected. Bradley-Terry: arXiv 2203.02155 eq. 1; margins: 2307.09288 eq. 2;
    centering, which holds scores near zero: 2312.09244.
    """
    chosen, rejected = scores.chunk(2)
    losses = -torch.nn.functional.logsigmoid(chosen - rejected - margins)
    return losses + centering * (chosen + rejected).square() if centering else losses


class RewardTrainer(StepsInPieces, NativeTrainer):
    """`row_losses` is the loss of each row; `measure` gives the metrics of the rows held out, without `eval_`."""

    def __init__(
        self, *args: Any, row_losses: RowLosses, measure: Callable[[], dict[str, float]],
        micro_batch_tokens: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.row_losses, self.measure, self.micro_batch_tokens = row_losses, measure, micro_batch_tokens
        self.before: dict[str, float] = {}
        """The metrics before the first step, whose weights have no checkpoint."""
        self.model_accepts_loss_kwargs = True  # else the Trainer divides once more, by the number of micro-batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an optimiser step, and how many rows they have together."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, sum(len(batch["labels"]) for batch in batches)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> Any:
        labels = inputs["labels"]
        read = {name: value for name, value in inputs.items() if name not in ("labels", "pieces")}
        scores = model(**read).logits.float()[:, 0]
        loss = self.row_losses(scores, labels).sum() / (num_items_in_batch or len(labels))
        return (loss, {"scores": scores}) if return_outputs else loss

    def share(self, model: Any, piece: dict[str, Any], number: Tensor | int) -> Tensor:
        loss: Tensor = self.compute_loss(model, piece, num_items_in_batch=int(number))
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the rows held out, log the metrics and return them."""
        with evaluating(self.model):
            measured = self.measure()
        if self.state.global_step == 0:
            self.before = measured
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class EvaluatesLast(TrainerCallback):
    """An evaluation after the last step, wherever the interval falls: the final weights may be the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True


class RewardCollator:
    """Texts -> [B, T]; pairs -> [2B, T], all chosen before all rejected. `labels` [B]: the label, or the pair's margin.

    With `micro_batch_tokens` also the `pieces` of the batch, as batches, whose texts are padded to the longest of a piece.
    """

    def __init__(self, tokenizer: Any, micro_batch_tokens: int | None = None) -> None:
        self.tokenizer, self.micro_batch_tokens = tokenizer, micro_batch_tokens

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sides = ("chosen", "rejected") if "chosen" in rows[0] else ("text",)
        batch: dict[str, Any] = dict(self._batch(rows, sides))
        if self.micro_batch_tokens is not None:
            lengths = [len(sides) * max(len(row[side]["input_ids"]) for side in sides) for row in rows]
            places = cut(lengths, self.micro_batch_tokens, padded=True)
            batch["pieces"] = [self._batch([rows[at] for at in piece], sides) for piece in places]
        return batch

    def _batch(self, rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Tensor]:
        texts = [row[side] for side in sides for row in rows]
        batch = dict(self.tokenizer.pad(texts, padding=True, padding_side="right", return_tensors="pt"))
        return batch | {"labels": torch.tensor([row["label"] for row in rows])}
