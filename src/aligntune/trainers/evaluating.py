"""How does a `transformers.Trainer` evaluate a language model? Exact loss, perplexity, and metrics of answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from aligntune.trainers.filling import filled

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


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
            rows = filled(rows, self.args.per_device_eval_batch_size * self.args.world_size)
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
