"""Preference pairs on `transformers.Trainer`: one packed forward for both sides, the loss of the whole optimiser batch.

Both answers of every pair of a micro-batch lie in one padding-free row, and the head sees the answers' tokens only: nothing
holds a [tokens, vocabulary] tensor. A loss is a share of the optimiser batch (all micro-batches and processes), so that it
does not depend on how the batch was cut; the losses that compare pairs with each other get the log-probabilities of the
whole batch from one pass without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.algorithms.batch import Loss, Normalizers, PairBatch, PairLogProbs, combine_metrics
from aligntune.algorithms.dpo import sequence_log_probs
from aligntune.models.forward import packed_log_probs
from aligntune.models.packed import PackedRows
from aligntune.trainers.parallel import AutocastLoss, wait_for_all
from aligntune.trainers.reference import Reference

STATE = "reference.pt"
"""File in a checkpoint that holds a reference which synchronisation has moved."""
REF_COLUMNS = ("ref_chosen", "ref_rejected")
"""Columns of precomputed reference log-probabilities, one number per token of the answer."""


@dataclass(frozen=True)
class Pairs:
    """B pairs as lists of tokens; `reference`: their log-probabilities under the reference, if computed before."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    reference: tuple[list[list[float]], list[list[float]]] | None = None

    @classmethod
    def collate(cls, rows: Sequence[dict[str, Any]]) -> dict[str, Pairs]:
        """A micro-batch as the trainer passes it on."""
        lists = [[list(row[name]) for row in rows] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        known = all(name in rows[0] for name in REF_COLUMNS)
        reference = tuple([list(row[name]) for row in rows] for name in REF_COLUMNS) if known else None
        return {"pairs": cls(*lists, reference)}  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass reads."""
        return sum(2 * len(p) + len(c) + len(r) for p, c, r in zip(self.prompts, self.chosen, self.rejected))

    def packed(self, device: torch.device) -> PackedRows:
        """2 B rows: the chosen sides, then the rejected ones. A prompt without tokens leaves its answer's first untrained."""
        rows, trained = [], []
        for answers in (self.chosen, self.rejected):
            rows += [[*prompt, *answer] for prompt, answer in zip(self.prompts, answers)]
            trained += [[False] * len(prompt) + [True] * len(answer) for prompt, answer in zip(self.prompts, answers)]
        return PackedRows.build(rows, trained, device)

    def known_reference(self, packed: PackedRows) -> Tensor | None:
        """`[M]` of the precomputed log-probabilities, in the order of `packed`'s trained tokens."""
        if self.reference is None:
            return None
        chosen, rejected = self.reference
        return torch.tensor([x for side in (chosen, rejected) for row in side for x in row], device=packed.targets.device)


@dataclass(frozen=True)
class Step:
    """What a micro-batch must know of its optimiser batch; `first`: its first pair's place in `whole`."""

    totals: Normalizers
    whole: PairLogProbs | None = None
    first: int = 0


class PairsTrainer(AutocastLoss, Trainer):
    """`reference` is None where the algorithm needs none, or all of its log-probabilities are in the rows.

    `quality` gives further metrics at every evaluation, without the `eval_` prefix.
    """

    quality: Callable[[], dict[str, float]] | None = None

    def __init__(
        self, model: Any, args: Any, *, spec: AlgorithmSpec, settings: Any, reference: Reference | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, args, data_collator=Pairs.collate, **kwargs)
        self.spec, self.settings, self.reference = spec, settings, reference
        self.needs = spec.needs(settings)
        self.tokens_read = 0
        """Tokens that this process has trained on."""
        self._shares: list[dict[str, Tensor]] = []
        self._logged: list[dict[str, Tensor]] = []
        if settings.sync_ref_model:
            self.add_callback(_MovesReference(self))

    # transformers' hooks --------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """The micro-batches of an optimiser step, each with what it must know of the others."""
        batches: list[dict[str, Any]] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        if batches:
            steps = self._steps([batch["pairs"] for batch in batches])
            batches = [{**batch, "step": step} for batch, step in zip(batches, steps)]
        return batches, None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch; its value is a share of the optimiser batch's loss."""
        model.train()
        processes = self.accelerator.num_processes
        with self.compute_loss_context_manager():
            loss = self.loss_of(model, inputs["pairs"], inputs["step"])
        scale = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss.value * processes, **scale)
        self.tokens_read += inputs["pairs"].tokens
        self._shares.append(loss.metrics)
        if self.accelerator.sync_gradients:
            self._logged.append(combine_metrics(self._shares))
            self._shares = []
        return loss.value.detach() * processes

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The loss of a batch by itself."""
        pairs = inputs["pairs"]
        with self.compute_loss_context_manager():
            loss = self.loss_of(model, pairs, inputs.get("step") or self._steps([pairs])[0])
        return (loss.value, loss.metrics) if return_outputs else loss.value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Training logs get the means over the optimiser steps since the last one."""
        if "loss" in logs and self._logged:
            names = sorted(set(self._logged[0]) - {"loss"})
            values = torch.stack([torch.stack([entry[name].double() for name in names]) for entry in self._logged]).mean(0)
            logs |= dict(zip(names, self.accelerator.reduce(values.to(self.args.device), "sum").tolist()))
            self._logged = []
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if self.reference is not None and isinstance(resume_from_checkpoint, (str, Path)):
            moved = Path(resume_from_checkpoint) / STATE
            if moved.exists():
                self.reference.load_state_dict(torch.load(moved, map_location="cpu", weights_only=True))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

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
        assert chosen is not None and rejected is not None
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

    def _steps(self, batches: Sequence[Pairs]) -> list[Step]:
        """Counts over the optimiser batch of all processes and, for losses that compare pairs, its log-probabilities."""
        counts = torch.tensor(
            [sum(map(len, batches)), sum(max(0, len(c) - (not p)) for pairs in batches for p, c in zip(pairs.prompts, pairs.chosen))],
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
            parts = [sequence_log_probs(self.batch(self.model_wrapped, pairs), self.settings) for pairs in batches]
        mine = PairLogProbs.cat(parts)
        if self.accelerator.num_processes == 1:
            return mine, 0
        everyone = [self.accelerator.gather(getattr(mine, name)) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
        return PairLogProbs(*everyone), self.accelerator.process_index * len(mine.chosen)

    # Evaluation -----------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **_: Any
    ) -> dict[str, float]:
        """Loss, implied rewards, accuracies and log-probabilities over all held-out pairs: exact, whatever the batches.

        A loss that compares pairs is taken over the whole evaluation set.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        was_training = self.model.training
        self.model.eval()
        try:
            found = self._measure(rows)
            if self.quality is not None:
                found |= self.quality()
        finally:
            self.model.train(was_training)
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
                parts = [sequence_log_probs(self.batch(self.model_wrapped, pairs), self.settings) for pairs, _ in batches]
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

    def _own_batches(self, rows: Any, processes: int) -> list[tuple[Pairs, bool]]:
        """This process's batches, and whether they count: every process must do the same number of forward passes."""
        size, own = self.args.per_device_eval_batch_size, self.accelerator.process_index % processes
        everyone = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        mine = [(places, True) for places in everyone[own::processes]]
        mine += [(everyone[0], False)] * (-(-len(everyone) // processes) - len(mine))
        return [(Pairs.collate(list(rows.select(places)))["pairs"], counts) for places, counts in mine]

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def save_reference(self, checkpoint: Path) -> None:
        """Write a reference that has moved, so that a resumed run goes on from it."""
        state = self.reference.state_dict() if self.reference is not None else {}
        if state and self.is_world_process_zero():
            torch.save(state, checkpoint / STATE)
        wait_for_all()


class _MovesReference(TrainerCallback):
    """TR-DPO: every `ref_model_sync_steps` optimiser steps the reference moves towards the policy."""

    def __init__(self, trainer: PairsTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settings, reference = self.trainer.settings, self.trainer.reference
        if reference is not None and state.global_step % settings.ref_model_sync_steps == 0:
            reference.sync(self.trainer.model, settings.ref_model_mixup_alpha)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_reference(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _answer_tokens(rows: Any) -> int:
    """Tokens of the chosen answers that have a predictor."""
    return sum(max(0, len(row["chosen_ids"]) - (not row["prompt_ids"])) for row in rows)
