"""The online loop on `transformers.Trainer`: rollout, reward, advantage, update.

The trainer knows no algorithm by name: the spec says what is needed, how rewards become advantages, and the loss. Every
optimiser step trains on `per_device_batch_size * gradient_accumulation_steps` completions per process. A rollout phase
samples `rollout_batch_size` prompts with `num_generations` completions each and serves
`num_ppo_epochs * completions / (completions per step)` optimiser steps.

Losses are shares of the whole optimiser batch (all passes, micro-batches and processes), so that they do not depend on how it
was cut. Nothing holds a [tokens, vocabulary] tensor.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from aligntune.algorithms.base import AlgorithmSpec, ScoredRollouts
from aligntune.algorithms.batch import Loss, Normalizers, combine_metrics
from aligntune.models.forward import runs_padded
from aligntune.rewards.normalise import Moments, merge
from aligntune.trainers.callbacks import TOKENS_SEEN
from aligntune.trainers.critic import Critic, CriticUpdates
from aligntune.trainers.native import NativeTrainer
from aligntune.trainers.online_forward import MEASURED_TOKENS, Forward, scatter
from aligntune.trainers.online_metrics import Meter, gathered_moments, of_all_processes, of_all_shares
from aligntune.trainers.online_plan import Plan
from aligntune.trainers.online_state import OnlineState, restore
from aligntune.trainers.parallel import AutocastLoss, gathered
from aligntune.trainers.passes import SharesInPieces, cut
from aligntune.trainers.reference import Reference, SyncReference
from aligntune.trainers.rollout import Rollout, length_mask, padded
from aligntune.trainers.rollout_phase import Sampler, Scored

logger = logging.getLogger(__name__)

ALL_TRUNCATED = (
    "every completion of a rollout was truncated, so that none carries loss: raise max_completion_length, or set "
    "mask_truncated_completions to false"
)
NONE_REWARDED = "every completion of a rollout has the reward None, so that none carries loss"
NONE_KEPT = (
    "the completions of every prompt of a rollout score the same, so that none carries loss: raise max_resample_batches or "
    "num_generations, or choose prompts that are neither too easy nor too hard"
)


class OnlineTrainer(SharesInPieces, AutocastLoss, NativeTrainer):
    """`sampler` makes rollouts; `reference` and `critic` where the spec needs them; `held_out(step)` gives the metrics of an
    evaluation."""

    def __init__(
        self, model: Any, args: Any, *, spec: AlgorithmSpec, settings: Any, plan: Plan, sampler: Sampler,
        reference: Reference | None = None, critic: Critic | None = None,
        held_out: Callable[[int], dict[str, float]] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, args, **kwargs)
        self.spec, self.settings, self.plan, self.sampler = spec, settings, plan, sampler
        self.micro_batch_tokens = settings.micro_batch_tokens
        self.reference, self.critic, self.held_out = reference, critic, held_out
        self.needs = spec.needs(settings)
        self.temperature = sampler.params.temperature or 1.0
        self.forward = Forward(critic, self.temperature)
        self.rollout: Rollout | None = None
        self.order = torch.empty(0, dtype=torch.long)
        """Rows of the phase in the order of training, for all its passes."""
        self.phase = 0
        """Rollout phases so far."""
        self.done = 0
        """Micro-batches of this phase that were trained on."""
        self.tokens = 0
        """Tokens that this process has trained on."""
        self.meter = Meter()
        self._totals = Normalizers(1, 1)
        self._shares: list[dict[str, Tensor]] = []
        self._warned: set[str] = set()
        self._update = (0.0, 0)
        """Seconds and tokens of this phase's updates."""
        self.critic_updates = None
        if critic is not None:
            critic.to(self.args.device)
            self.critic_updates = CriticUpdates(critic, self)
            self.add_callback(self.critic_updates)
        if reference is not None and settings.sync_ref_model:
            self.add_callback(
                SyncReference(reference, model, settings.ref_model_mixup_alpha, settings.ref_model_sync_steps)
            )
        self.add_callback(OnlineState(self))

    # transformers' hooks --------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """One empty item per micro-batch of a pass: prompts are drawn when a phase begins, not when a loader prefetches."""
        phases = self.plan.phases(len(self.sampler.stream), self.args.world_size)
        items = range(phases * self.plan.steps * self.plan.accumulation)
        return DataLoader(items, batch_size=1, collate_fn=lambda _: {})  # type: ignore[arg-type]

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, (str, Path)):
            restore(self, Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of each piece of the next micro-batch; a new phase first when the last one is used up."""
        if self.rollout is None or self.done == self.plan.steps * self.plan.accumulation:
            self.begin_phase()
        assert self.rollout is not None
        started = time.perf_counter()
        if self.done % self.plan.accumulation == 0:
            self._begin_step()
        model.train()
        rows = self.rollout.with_loss(self.order[self.done * self.plan.micro : (self.done + 1) * self.plan.micro])
        pieces = self.pieces(rows, self.micro_batch_tokens)
        value, metrics = self.train_on(model, pieces, lambda piece: self.loss_of(model, piece))
        self._shares += metrics
        read = sum(self.rollout.lengths(rows))
        self.tokens += read
        self.done += 1
        self._update = (self._update[0] + time.perf_counter() - started, self._update[1] + read)
        if self.done % self.plan.accumulation == 0:
            self._end_step()
        return value

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out prompts, answered greedily: rewards, and the share answered right at the first attempt (pass@1)."""
        found = self.held_out(self.state.global_step) if self.held_out is not None else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Training logs get what was measured since the last one."""
        if "loss" in logs:
            logs |= self.meter.pop() | {TOKENS_SEEN: self.tokens_of_all()}
        super().log(logs, *args, **kwargs)

    def tokens_of_all(self) -> int:
        """Tokens trained on so far, by all processes; each must call it."""
        return int(self._all_sum(torch.tensor(self.tokens, dtype=torch.int64)))

    # A phase --------------------------------------------------------------------------------------------------------

    def begin_phase(self) -> None:
        """Sample and score completions, and decide in which order they are trained on."""
        seed = self.args.seed + 7919 * (self.phase * self.args.world_size + self.args.process_index)
        self.model.eval()
        scored = self.sampler.sample(self.plan.prompts, seed, gathered)
        self.rollout = self._rollout(scored)
        self.phase, self.done, self._update = self.phase + 1, 0, (0.0, 0)
        generator = torch.Generator().manual_seed(self.args.seed + self.phase)
        count = len(self.rollout)
        shuffled = self.plan.passes > 1
        passes = [
            torch.randperm(count, generator=generator) if shuffled else torch.arange(count)
            for _ in range(self.plan.passes)
        ]
        self.order = torch.cat(passes)

    def _rollout(self, scored: Scored) -> Rollout:
        """Log-probabilities of policy and reference, values, and what the spec makes of the rewards."""
        found, group = scored.rollouts, self.plan.group
        mask, ended = length_mask(found.completion_ids), torch.tensor(found.finished)
        rewarded = ~scored.rewards.isnan().flatten()
        counted = rewarded.clone()
        counted[len(counted) - scored.fillers * group :] = False
        loss_mask = mask & counted[:, None]
        if self.settings.mask_truncated_completions:
            loss_mask &= ended[:, None]
        sampler = padded(found.sampler_log_probs)
        prompts = [list(row["prompt_ids"]) for row in scored.rows for _ in range(group)]
        rollout = Rollout(
            prompts, found.completion_ids, loss_mask, counted, torch.empty(0), sampler, metrics=scored.metrics
        )
        started = time.perf_counter()
        self._measure(rollout)
        rollout.metrics["perf/scoring_seconds"] = time.perf_counter() - started
        if found.log_probs is not None and rollout.old_log_probs is not None:
            difference = (rollout.old_log_probs - padded(found.log_probs)).abs()[loss_mask]
            rollout.metrics["engine_mismatch"] = float(difference.mean()) if len(difference) else 0.0
        old = (
            rollout.old_log_probs
            if rollout.old_log_probs is not None
            else padded(found.log_probs or found.sampler_log_probs)
        )
        made = self.spec.compute_advantages(
            ScoredRollouts(scored.rewards, mask & rewarded[:, None], ended, old, rollout.ref_log_probs, rollout.values),
            self.settings, self._all_sum,
        )  # fmt: skip
        rollout.advantages, rollout.returns = made.advantages, made.returns
        rollout.metrics |= {name: float(value) for name, value in made.metrics.items()} | self._spread_of_advantages(
            rollout
        )
        if not bool(loss_mask.any()):
            self._warn_once(ALL_TRUNCATED if counted.any() else NONE_KEPT if rewarded.any() else NONE_REWARDED)
        return rollout

    def _spread_of_advantages(self, rollout: Rollout) -> dict[str, float]:
        """Mean and population spread of the advantages that reach the loss, over all processes."""
        advantages = rollout.advantages
        mask = rollout.loss_mask
        used = (advantages[mask] if advantages.dim() == 2 else advantages[mask.any(1)]).double()
        center = float(used.mean()) if len(used) else 0.0
        whole: Moments = (0.0, 0.0, 0.0)
        for part in gathered_moments((float(len(used)), center, float((used - center).square().sum()))):
            whole = merge(whole, part)
        count, mean, squares = whole
        return {"advantages/mean": mean, "advantages/std": math.sqrt(squares / count)} if count else {}

    @torch.no_grad()
    def _measure(self, rollout: Rollout) -> None:
        """Old log-probabilities (where an update will differ from the sampling policy), the reference's, and values.

        Rows without loss are left out, unless there are values: then the advantages look at every row.
        """
        needs, shape = self.needs, rollout.loss_mask.shape
        rows = torch.arange(len(rollout)) if needs.values else rollout.with_loss(torch.arange(len(rollout)))
        if not self.plan.on_policy or needs.values:
            rollout.old_log_probs = torch.zeros(shape)
        rollout.values = torch.zeros(shape) if needs.values else None
        rollout.ref_log_probs = torch.zeros(shape) if needs.reference else None
        if rollout.old_log_probs is None and rollout.ref_log_probs is None:
            return
        for part, _ in self.in_step(self.pieces(rows, MEASURED_TOKENS, rollout)):
            packed = rollout.packed(part, self.args.device)
            with self.compute_loss_context_manager():
                if rollout.old_log_probs is not None:
                    found = self.forward(self.model_wrapped, packed)
                    scatter(rollout.old_log_probs, part, packed.padded(found.log_probs))
                    if rollout.values is not None and found.values is not None:
                        scatter(rollout.values, part, packed.padded(found.values))
                if rollout.ref_log_probs is not None and self.reference is not None:
                    reference = self.reference.log_probs(packed, self.temperature)
                    scatter(rollout.ref_log_probs, part, packed.padded(reference))

    # A step ---------------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        """Counts over the whole optimiser batch, of all processes."""
        assert self.rollout is not None
        start = self.done * self.plan.micro
        mine = self.rollout.counts(self.order[start : start + self.plan.step], self.settings.max_completion_length)
        both = self._all_sum(torch.stack([torch.as_tensor(mine.num_sequences), torch.as_tensor(mine.num_tokens)]))
        sequences, tokens = both.tolist()
        self._totals = Normalizers(sequences, tokens, self.settings.max_completion_length)

    def loss_of(self, model: Any, rows: Tensor) -> Loss:
        """The loss share of the completions `rows` of this phase."""
        assert self.rollout is not None
        packed = self.rollout.packed(rows, self.args.device)
        new = self.forward(model, packed, entropy=True, entropy_grad=self.needs.entropy)
        return self.spec.loss(self.rollout.batch(rows, packed, new), self.settings, self._totals)

    def pieces(self, rows: Tensor, limit: int | None, rollout: Rollout | None = None) -> list[Tensor]:
        """`rows` of this phase (or of `rollout`) in pieces of at most `limit` tokens each."""
        phase = self.rollout if rollout is None else rollout
        assert phase is not None
        found = cut(phase.lengths(rows), limit, padded=runs_padded(self.model))
        return [rows[places] for places in found]

    def _end_step(self) -> None:
        """Metrics of the finished optimiser batch, over all processes."""
        assert self.rollout is not None
        entry = of_all_shares(combine_metrics(self._shares), self.accelerator)
        entry.pop("loss", None)  # the trainer's own
        self._shares = []
        if self.done == self.plan.accumulation:  # the first step of a phase brings the phase's own numbers
            entry |= of_all_processes(self._with_speed(self.rollout), self.accelerator)
        if self.done == self.plan.steps * self.plan.accumulation:
            seconds, tokens = self._update
            entry |= {"perf/update_seconds": seconds, "perf/update_tokens_per_second": tokens / max(seconds, 1e-9)}
        self.meter.add(entry)

    def _with_speed(self, rollout: Rollout) -> dict[str, float]:
        tokens = rollout.metrics["completions/mean_length"] * len(rollout)
        speed = tokens / max(rollout.metrics["perf/rollout_seconds"], 1e-9)
        return rollout.metrics | {"perf/rollout_tokens_per_second": speed}

    # Processes ------------------------------------------------------------------------------------------------------

    def _all_sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        total = value.to(self.args.device)
        distributed.all_reduce(total)
        return total.to(value.device)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)
