"""How does a `transformers.Trainer` evaluate a language model? Exact loss, perplexity, and metrics of answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets

from aligntune.data.masks import IGNORED

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


NO_ROW = -1
"""The `row` of a row that only fills up a batch."""


class LanguageModelEvaluation(_Base):
    """Mixin: `eval_loss` is the mean over all trained tokens, whatever the batches; transformers averages batch means.

    `quality` computes further metrics (without the `eval_` prefix) at every evaluation, so that each can be
    `metric_for_best_model`. `perplexity` is exp of the token-weighted negative log-likelihood, also when the training
    loss is another one (`token_nll` then computes it from the batch).
    """

    quality: Callable[[], dict[str, float]] | None = None
    token_nll: Callable[[Any, dict[str, Any]], torch.Tensor] | None = None
    with_perplexity: bool = True

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.model.training and "labels" in inputs:
            self.count_loss(model, inputs, found[0] if isinstance(found, tuple) else found)
        return found

    def count_loss(self, model: Any, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Add an evaluation batch's mean loss to the sums, by its number of trained tokens."""
        tokens = (inputs["labels"][..., 1:] != -100).sum()
        total = torch.where(tokens > 0, loss.detach() * tokens, 0.0)  # the mean of nothing is NaN
        nll = total if self.token_nll is None else self.token_nll(model, inputs)
        self._sums = self._sums + torch.stack([total, nll, tokens.to(total.dtype)]).double()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1:
            rows = rows_without_repeats(rows, self.args.per_device_eval_batch_size * self.args.world_size)
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False  # a setting for training
        try:
            return super().get_eval_dataloader(rows)
        finally:
            self.args.dataloader_drop_last = drops

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, nll, tokens = self.accelerator.reduce(self._sums, "sum").tolist()
        if tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
            if self.with_perplexity:
                output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(nll / tokens, 700.0))
        if self.quality is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.quality().items()})
        return output


def rows_without_repeats(rows: Any, size: int) -> Any:
    """`rows` filled up to whole batches of `size` (over all processes) with rows that carry no labels, and `NO_ROW` where
    rows have a `row`.

    Several processes must do the same number of batches; accelerate repeats the first rows to get there, which would count
    them twice.
    """
    if isinstance(rows, IterableDataset):
        return _FilledStream(rows, size)
    if not isinstance(rows, Dataset) or "labels" not in rows.column_names or not -len(rows) % size:
        return rows
    fillers = rows.select([0] * (-len(rows) % size)).map(_without_labels, features=rows.features)
    return concatenate_datasets([rows, fillers])


class _FilledStream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, rows: IterableDataset, size: int) -> None:
        self.rows, self.size = rows, size

    def __iter__(self) -> Iterator[Any]:
        place = -1
        for place, row in enumerate(self.rows):  # noqa: B007  (read behind the loop)
            yield row
        for _ in range(-(place + 1) % self.size):
            yield row | _without_labels(row)


def _without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {"labels": np.full(np.shape(row["labels"]), IGNORED)[()]} | ({"row": NO_ROW} if "row" in row else {})
