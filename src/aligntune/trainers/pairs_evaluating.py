"""Held-out preference pairs inside a `transformers.Trainer`: the same exact numbers whoever trains, native or TRL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.batch import Loss, Normalizers, PairBatch, PairLogProbs, combine_metrics
from aligntune.algorithms.dpo import sequence_log_probs
from aligntune.data.sources import list_lengths
from aligntune.models.forward import packed_log_probs
from aligntune.models.modes import evaluating
from aligntune.models.packed import PackedRows
from aligntune.trainers.pair_batches import Pairs, Step
from aligntune.trainers.reference import Reference

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class PairsEvaluation(_Base):
    """Mixin: the loss of packed pairs under policy and reference, and an evaluation made of it.

    `quality` gives further metrics at every evaluation, without the `eval_` prefix.
    """

    quality: Callable[[], dict[str, float]] | None = None

    def set_algorithm(self, spec: AlgorithmSpec, settings: Any, reference: Reference | None) -> None:
        """`reference`: None where the algorithm needs none, or the rows hold its log-probabilities."""
        self.spec, self.settings, self.reference = spec, settings, reference
        self.needs = spec.needs(settings)

    # The loss -------------------------------------------------------------------------------------------------------

    def loss_of(self, model: Any, pairs: Pairs, step: Step) -> Loss:
        """The share of the optimiser batch's loss that these pairs have."""
        return self.spec.loss(self.batch(model, pairs, step), self.settings, step.totals)

    def batch(self, model: Any, pairs: Pairs, step: Step | None = None) -> PairBatch:
        """Both sides under policy and reference, from one forward pass of each."""
        rows = pairs.packed(self.args.device)
        found = packed_log_probs(model, rows, collision=self.needs.collision)
        reference = self._reference(pairs, rows)
        tokens = [found.log_probs, reference, found.log_collision]
        mask, count = rows.mask(), len(pairs)
        (chosen, ref_chosen, like_chosen), (rejected, ref_rejected, like_rejected) = (
            [None if values is None else rows.padded(values.float())[side] for values in tokens]
            for side in (slice(None, count), slice(count, None))
        )
        assert chosen is not None
        assert rejected is not None
        return PairBatch(
            chosen, rejected, mask[:count], mask[count:], ref_chosen, ref_rejected, like_chosen, like_rejected,
            whole=step.whole if step is not None else None, first=step.first if step is not None else 0,
        )  # fmt: skip

    def _reference(self, pairs: Pairs, rows: PackedRows) -> Tensor | None:
        if not self.needs.reference:
            return None
        known = pairs.known_reference(rows)
        if known is not None:
            return known
        assert self.reference is not None
        return self.reference.log_probs(rows)

    # Evaluation -----------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **_: Any
    ) -> dict[str, float]:
        """Loss, implied rewards, accuracies and log-probabilities over all held-out pairs: exact, whatever the batches.

        A loss that compares pairs is taken over the whole evaluation set.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        with evaluating(self.model):
            found = self._measure(rows)
            if self.quality is not None:
                found |= self.quality()
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _measure(self, rows: Any) -> dict[str, float]:
        compares = self.needs.whole_batch  # then every process measures all pairs, since each depends on all
        batches = self._own_batches(rows, 1 if compares else self.accelerator.num_processes)
        totals = Normalizers(len(rows), _answer_tokens(rows))
        self.callback_handler.eval_dataloader = batches
        whole, shares, first = None, [], 0
        if compares:
            with self.compute_loss_context_manager():
                parts = [
                    sequence_log_probs(self.batch(self.model_wrapped, pairs), self.settings) for pairs, _ in batches
                ]
            whole = PairLogProbs.cat(parts)
        for pairs, counts in batches:
            with self.compute_loss_context_manager():
                found = self.loss_of(self.model_wrapped, pairs, Step(totals, whole, first)).metrics
            shares.append(found if counts else {name: torch.zeros_like(value) for name, value in found.items()})
            first += len(pairs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total = combine_metrics(shares)
        names = sorted(total)
        values = torch.stack([total[name].double() for name in names])
        if not compares:
            values = self.accelerator.reduce(values, "sum")
        return dict(zip(names, values.tolist()))

    def _own_batches(self, rows: Any, processes: int) -> _Batches:
        """This process's batches, and whether they count: every process must do the same number of forward passes."""
        size, own = self.args.per_device_eval_batch_size, self.accelerator.process_index % processes
        everyone = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        mine = [(places, True) for places in everyone[own::processes]]
        mine += [(everyone[0], False)] * (-(-len(everyone) // processes) - len(mine))
        return _Batches(rows, mine)


@dataclass(frozen=True)
class _Batches:
    """Batches of `rows` by their places, each with whether it counts; one at a time in memory."""

    rows: Any
    places: Sequence[tuple[range, bool]]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[Pairs, bool]]:
        for places, counts in self.places:
            yield Pairs.collate(list(self.rows.select(places)))["pairs"], counts


def _answer_tokens(rows: Any) -> int:
    """Tokens of the chosen answers that have a predictor."""
    chosen, prompts = (list_lengths(rows, name) for name in ("chosen_ids", "prompt_ids"))
    return int(np.maximum(0, chosen - (prompts == 0)).sum())
