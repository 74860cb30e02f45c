"""Preference pairs on `transformers.Trainer`: one packed forward for both sides, the loss of the whole optimiser batch.

Both answers of every pair of a pass lie in one padding-free row, and the head sees the answers' tokens only: nothing holds a
[tokens, vocabulary] tensor. A loss is a share of the optimiser batch (all passes, micro-batches and processes), so that it
does not depend on how the batch was cut; the losses that compare pairs with each other get the log-probabilities of the
whole batch from one pass without gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.batch import Loss, Normalizers, PairLogProbs, combine_metrics
from aligntune.algorithms.dpo import sequence_log_probs
from aligntune.models.forward import runs_padded
from aligntune.trainers.filling import FillsLastBatch
from aligntune.trainers.length_groups import GroupsByLength
from aligntune.trainers.native import NativeTrainer
from aligntune.trainers.pair_batches import Pairs, Step
from aligntune.trainers.pairs_evaluating import PairsEvaluation
from aligntune.trainers.parallel import AutocastLoss
from aligntune.trainers.passes import SharesInPieces
from aligntune.trainers.reference import KeepsReference, Reference, SavesReference, SyncReference


class PairsTrainer(
    KeepsReference, SharesInPieces, PairsEvaluation, FillsLastBatch, GroupsByLength, AutocastLoss, NativeTrainer
):
    """`reference` is None where the algorithm needs none, or all of its log-probabilities are in the rows."""

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        spec: AlgorithmSpec,
        settings: Any,
        reference: Reference | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, data_collator=Pairs.collate, **kwargs)
        self.set_algorithm(spec, settings, reference)
        self.micro_batch_tokens = settings.micro_batch_tokens
        self._shares: list[dict[str, Tensor]] = []
        self._logged: list[dict[str, Tensor]] = []
        if settings.sync_ref_model and reference is not None:
            self.add_callback(
                SyncReference(reference, self.model, settings.ref_model_mixup_alpha, settings.ref_model_sync_steps)
            )
            self.add_callback(SavesReference(self))

    # transformers' hooks --------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The micro-batches of an optimiser step in `pieces`, each with what it must know of the others."""
        batches: list[dict[str, Any]] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        padded = runs_padded(self.model)
        pieces = [batch["pairs"].pieces(self.micro_batch_tokens, padded=padded) for batch in batches]
        if batches:
            steps = iter(self._steps([piece for batch in pieces for piece in batch]))
            batches = [
                {**batch, "pieces": [(piece, next(steps)) for piece in own]} for batch, own in zip(batches, pieces)
            ]
        return batches, None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of each piece of a micro-batch; the sum of their shares of the optimiser batch's loss."""
        model.train()
        value, metrics = self.train_on(model, inputs["pieces"], lambda piece: self._share(model, *piece))
        self._shares += metrics
        if self.accelerator.sync_gradients:
            self._logged.append(combine_metrics(self._shares))
            self._shares = []
        return value

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The loss of a batch by itself."""
        pairs = inputs["pairs"]
        with self.compute_loss_context_manager():
            loss = self.loss_of(model, pairs, self._steps([pairs])[0])
        return (loss.value, loss.metrics) if return_outputs else loss.value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Training logs get the means over the optimiser steps since the last one."""
        if "loss" in logs and self._logged:
            names = sorted(set(self._logged[0]) - {"loss"})
            values = torch.stack(
                [torch.stack([entry[name].double() for name in names]) for entry in self._logged]
            ).mean(0)
            logs |= dict(zip(names, self.accelerator.reduce(values.to(self.args.device), "sum").tolist()))
            self._logged = []
        super().log(logs, *args, **kwargs)

    # A step ---------------------------------------------------------------------------------------------------------

    def _share(self, model: Any, pairs: Pairs, step: Step) -> Loss:
        """The loss of a piece, nothing where it does not count."""
        loss = self.loss_of(model, pairs, step)
        if pairs.counts:
            return loss
        return Loss(0 * loss.value, {name: torch.zeros_like(value) for name, value in loss.metrics.items()})

    def _steps(self, batches: Sequence[Pairs]) -> list[Step]:
        """For each of this process's pieces: counts over the optimiser batch of all processes and, for losses that compare pairs, its log-probabilities."""
        counted = [pairs for pairs in batches if pairs.counts]
        counts = torch.tensor(
            [
                sum(map(len, counted)),
                sum(max(0, len(c) - (not p)) for pairs in counted for p, c in zip(pairs.prompts, pairs.chosen)),
            ],
            dtype=torch.float64,
        )
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.to(self.args.device), "sum").cpu()
        sequences, tokens = counts.tolist()
        totals = Normalizers(sequences, tokens)
        if not self.needs.whole_batch:
            return [Step(totals)] * len(batches)
        whole, own = self._whole(batches)
        firsts = [own + sum(map(len, batches[:at])) for at in range(len(batches))]
        return [Step(totals, whole, first) for first in firsts]

    @torch.no_grad()
    def _whole(self, batches: Sequence[Pairs]) -> tuple[PairLogProbs, int]:
        """Sequence log-probabilities of the optimiser batch, and where this process's begin."""
        with self.compute_loss_context_manager():
            found = [
                (sequence_log_probs(self.batch(self.model_wrapped, pairs), self.settings), counts and pairs.counts)
                for pairs, counts in self.in_step(batches)
            ]
        none = PairLogProbs(*(values[:0] for values in vars(found[0][0]).values()))
        mine = PairLogProbs.cat([none, *(part for part, counts in found if counts)])
        if self.accelerator.num_processes == 1:
            return mine, 0
        sizes = self.accelerator.gather(torch.tensor([len(mine.chosen)], device=mine.chosen.device)).tolist()
        most, everyone = max(sizes), []
        for values in vars(mine).values():
            parts = self.accelerator.gather(nn.functional.pad(values, (0, most - len(values)))).split(most)
            everyone.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
        return PairLogProbs(*everyone), sum(sizes[: self.accelerator.process_index])
