"""The online loop on `transformers.Trainer`: rollout, reward, advantage, update.

The trainer knows no algorithm by name: the spec says what is needed, how rewards become advantages, and the loss. Every
optimiser step trains on `per_device_batch_size * gradient_accumulation_steps` completions per process. A rollout phase
samples `rollout_batch_size` prompts with `num_generations` completions each and serves
`epochs * completions / (completions per step)` optimiser steps.

Losses are shares of the whole optimiser batch (all micro-batches and processes), so that they do not depend on how it was
cut. Nothing holds a [tokens, vocabulary] tensor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from aligntune.algorithms.base import AlgorithmSpec, ScoredRollouts
from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch, combine_metrics
from aligntune.models.forward import model_head, trunk_hidden
from aligntune.models.kernels.linear_loss import linear_log_probs
from aligntune.models.packed import PackedRows
from aligntune.models.wrapped import run_as_forward
from aligntune.trainers.critic import Critic
from aligntune.trainers.parallel import AutocastLoss
from aligntune.trainers.rollout_phase import Rollout, Sampler, fill_missing, length_mask, padded

logger = logging.getLogger(__name__)

STATE = "rollouts.pt"
"""File in a checkpoint that holds the phase in progress."""


@dataclass(frozen=True)
class Plan:
    """How phases, steps and micro-batches fit together, per process."""

    prompts: int
    """Prompts of a rollout phase."""
    group: int
    micro: int
    """Completions of a forward pass."""
    accumulation: int
    passes: int
    """Passes over each phase."""

    @property
    def completions(self) -> int:
        return self.prompts * self.group

    @property
    def step(self) -> int:
        """Completions of an optimiser step."""
        return self.micro * self.accumulation

    @property
    def steps(self) -> int:
        """Optimiser steps of a phase."""
        return self.passes * self.completions // self.step

    @property
    def on_policy(self) -> bool:
        """Whether each phase serves a single update, so that the ratio is 1."""
        return self.steps == 1


class OnlineTrainer(AutocastLoss, Trainer):
    """`sampler` makes rollouts, `reference` (an object with `log_probs(rows, temperature)` and `sync`) and `critic` where
    the spec needs them; `held_out(step)` gives the metrics of an evaluation."""

    def __init__(
        self, model: Any, args: Any, *, spec: AlgorithmSpec, settings: Any, plan: Plan, sampler: Sampler, reference: Any = None,
        critic: Critic | None = None, held_out: Callable[[int], dict[str, float]] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(model, args, **kwargs)
        self.spec, self.settings, self.plan, self.sampler = spec, settings, plan, sampler
        self.reference, self.critic, self.held_out = reference, critic, held_out
        self.needs = spec.needs(settings)
        self.phase = 0
        """Rollout phases so far."""
        self.done = 0
        """Micro-batches of this phase that were trained on."""
        self.rollout: Rollout | None = None
        self._order: Tensor = torch.empty(0)
        self._totals = Normalizers(1, 1)
        self._shares: list[dict[str, Tensor]] = []
        self._logged: list[dict[str, float]] = []
        self._update_seconds = 0.0
        self._warned: set[str] = set()
        self._sync_after_step = False
        if critic is not None:
            critic.to(self.args.device)
            self.add_callback(_CriticGradients(self))
        self.add_callback(_KeepsRollouts(self))

    # transformers' hooks --------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """One empty item per micro-batch: prompts are drawn when a phase begins, not when a loader prefetches."""
        items = range(self.args.max_steps * self.plan.accumulation)
        return DataLoader(items, batch_size=1, collate_fn=lambda _: {})  # type: ignore[arg-type]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.critic is not None:
            parameters = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        return optimizer

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool):
            self.load_phase(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of the next micro-batch; a new phase first when the last one is used up."""
        if self.rollout is None or self.done == self.plan.steps * self.plan.accumulation:
            self._begin_phase()
        started = time.perf_counter()
        if self.done % self.plan.accumulation == 0:
            self._begin_step()
        model.train()
        rows = self._rows_of(self.done)
        with self.compute_loss_context_manager():
            loss = self.loss_of(model, rows)
        scale = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss.value * self.accelerator.num_processes, **scale)
        self.done += 1
        self._shares.append(loss.metrics)
        self._update_seconds += time.perf_counter() - started
        if self.done % self.plan.accumulation == 0:
            self._end_step()
        return loss.value.detach() * self.accelerator.num_processes

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out prompts, answered greedily: rewards, and the share answered right at the first attempt (pass@1)."""
        found = self.held_out(self.state.global_step) if self.held_out is not None else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Training logs get the means of what was measured since the last one."""
        if "loss" in logs and self._logged:
            names = dict.fromkeys(name for entry in self._logged for name in entry)
            for name in names:
                values = [entry[name] for entry in self._logged if name in entry]
                logs[name] = sum(values) / len(values) if name != "loss" else logs["loss"]
            self._logged = []
        if "epoch" in logs or "loss" in logs:
            logs["epoch"] = round(self.sampler.stream.epoch, 4)
        super().log(logs, *args, **kwargs)

    # A phase --------------------------------------------------------------------------------------------------------

    def _begin_phase(self) -> None:
        seed = self.args.seed + 7919 * self.phase * self.accelerator.num_processes + self.accelerator.process_index
        self.model.eval()
        scored = self.sampler.sample(self.plan.prompts, seed)
        self.rollout = self._with_advantages(scored)
        self.phase, self.done = self.phase + 1, 0
        generator = torch.Generator().manual_seed(self.args.seed + self.phase)
        count = len(self.rollout)
        passes = [torch.randperm(count, generator=generator) if self.plan.passes > 1 else torch.arange(count) for _ in range(self.plan.passes)]
        self._order = torch.cat(passes)
        self._update_seconds = 0.0

    def _with_advantages(self, scored: Any) -> Rollout:
        """Log-probabilities of policy and reference, values, and what the spec makes of the rewards."""
        found = scored.rollouts
        prompts = [list(row["prompt_ids"]) for row in scored.rows for _ in range(self.plan.group)]
        mask = length_mask(found.completion_ids)
        ended = torch.tensor(found.finished)
        rewards, missing = fill_missing(scored.rewards)
        loss_mask = mask & ~missing.flatten()[:, None]
        if self.spec.masks_truncated(self.settings):
            loss_mask &= ended[:, None]
        sampler = padded(found.sampler_log_probs)
        rollout = Rollout(
            prompts, found.completion_ids, ended, loss_mask, rewards, torch.empty(0), sampler, metrics=dict(scored.metrics)
        )
        self._measure(rollout)
        old = rollout.old_log_probs if rollout.old_log_probs is not None else sampler
        advantages = self.spec.compute_advantages(
            ScoredRollouts(rewards, mask, ended, old, rollout.ref_log_probs, rollout.values), self.settings, self._all_sum
        )
        rollout.advantages, rollout.returns = advantages.advantages, advantages.returns
        rollout.metrics |= {name: float(value) for name, value in advantages.metrics.items()}
        rollout.metrics["reward"] = float(rewards.mean())
        spread = rollout.advantages
        rollout.metrics |= {"advantages/mean": float(spread.mean()), "advantages/std": float(spread.std()) if spread.numel() > 1 else 0.0}
        if not bool(loss_mask.any()):
            self._warn_once("every completion of a rollout was truncated, so that none carries loss: raise max_completion_length, or set "
                            "mask_truncated_completions to false")  # fmt: skip
        return rollout

    @torch.no_grad()
    def _measure(self, rollout: Rollout) -> None:
        """Old log-probabilities (where an update will differ from the sampling policy), the reference's, and values."""
        needs = self.needs
        wants_old = not self.plan.on_policy or needs.values
        parts: dict[str, list[Tensor]] = {"old": [], "ref": [], "values": []}
        width = rollout.sampler_log_probs.shape[1]
        for start in range(0, len(rollout), self.plan.micro):
            rows = self._packed(rollout, range(start, min(start + self.plan.micro, len(rollout))))
            with self.compute_loss_context_manager():
                if wants_old:
                    log_probs, _, values = self._forward(self.model_wrapped, rows, entropy=False)
                    parts["old"].append(_wide(rows.padded(log_probs), width))
                    if values is not None:
                        parts["values"].append(_wide(rows.padded(values), width))
                if needs.reference:
                    reference = self.reference.log_probs(rows, self.settings.temperature)
                    parts["ref"].append(_wide(rows.padded(reference), width))
        rollout.old_log_probs = torch.cat(parts["old"]).cpu() if parts["old"] else None
        rollout.ref_log_probs = torch.cat(parts["ref"]).cpu() if parts["ref"] else None
        rollout.values = torch.cat(parts["values"]).cpu() if parts["values"] else None

    # A step ---------------------------------------------------------------------------------------------------------

    def _rows_of(self, micro_batch: int) -> Tensor:
        return self._order[micro_batch * self.plan.micro : (micro_batch + 1) * self.plan.micro]

    def _begin_step(self) -> None:
        """Counts over the whole optimiser batch, of all processes."""
        assert self.rollout is not None
        start = self.done * self.plan.micro
        rows = self._order[start : start + self.plan.step]
        tokens = self._all_sum(self.rollout.loss_mask[rows].sum().double())
        sequences = len(rows) * self.accelerator.num_processes
        self._totals = Normalizers(sequences, tokens.item(), self.settings.max_completion_length)

    def loss_of(self, model: Any, rows: Tensor) -> Loss:
        """The loss share of the completions `rows` of this phase."""
        rollout = self.rollout
        assert rollout is not None
        packed = self._packed(rollout, rows.tolist())
        log_probs, entropy, values = self._forward(model, packed, entropy=True)
        new = packed.padded(log_probs)
        width, device = new.shape[1], new.device
        old = new.detach() if rollout.old_log_probs is None else rollout.old_log_probs[rows, :width].to(device)

        def part(of: Tensor | None) -> Tensor | None:
            return None if of is None else of[rows, :width].to(device)

        advantages = rollout.advantages[rows]
        batch = RolloutBatch(
            new, old, rollout.loss_mask[rows, :width].to(device), (advantages[:, :width] if advantages.dim() == 2 else advantages).to(device),
            part(rollout.ref_log_probs), part(rollout.sampler_log_probs),
            None if values is None else packed.padded(values), part(rollout.values), part(rollout.returns),
            None if entropy is None else packed.padded(entropy),
        )  # fmt: skip
        return self.spec.loss(batch, self.settings, self._totals)

    def _forward(self, model: Any, rows: PackedRows, *, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(log-probabilities, entropy, values), [M] each, of the trained tokens; through the model's wrappers."""

        def compute(_: Any = None) -> tuple[Tensor, ...]:
            hidden = trunk_hidden(self.model, rows)[rows.predictors]
            head = model_head(self.model)
            found = linear_log_probs(
                hidden, head.weight, rows.targets, **head.arguments(self.settings.temperature), entropy=entropy,
                entropy_grad=entropy and self.needs.entropy,
            )  # fmt: skip
            values = () if self.critic is None else (self.critic(rows, hidden),)
            return (found.log_probs, *((found.entropy,) if entropy else ()), *values)

        out = list(run_as_forward(model, compute))
        log_probs = out.pop(0)
        return log_probs, out.pop(0) if entropy else None, out.pop(0) if out else None

    def _packed(self, rollout: Rollout, at: Any) -> PackedRows:
        prompts, completions = [rollout.prompt_ids[i] for i in at], [rollout.completion_ids[i] for i in at]
        return PackedRows.from_completions(prompts, completions, self.args.device)

    def _end_step(self) -> None:
        """Metrics of the finished optimiser batch, over all processes."""
        assert self.rollout is not None
        shares = combine_metrics(self._shares)
        self._shares = []
        names = sorted(shares)
        values = torch.stack([shares[name].detach().double() for name in names]) if names else torch.empty(0)
        if self.accelerator.num_processes > 1:
            values = self._reduced(names, values)
        entry = dict(zip(names, values.tolist()))
        entry.pop("loss", None)
        if self.done == self.plan.accumulation:  # the first step of a phase brings the phase's own numbers
            entry |= self._phase_metrics()
        if self.done == self.plan.steps * self.plan.accumulation:
            entry["perf/update_seconds"] = self._update_seconds
        self._logged.append(entry)
        if self.settings.sync_ref_model and self.reference is not None and (self.state.global_step + 1) % self.settings.ref_model_sync_steps == 0:
            self._sync_after_step = True

    def _phase_metrics(self) -> dict[str, float]:
        assert self.rollout is not None
        metrics = self.rollout.metrics
        if self.accelerator.num_processes == 1:
            return dict(metrics)
        names = sorted(metrics)
        total = self._all_sum(torch.tensor([metrics[name] for name in names], dtype=torch.float64))
        return dict(zip(names, (total / self.accelerator.num_processes).tolist()))

    # Processes ------------------------------------------------------------------------------------------------------

    def _all_sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        total = value.to(self.args.device)
        distributed.all_reduce(total)
        return total.to(value.device)

    def _reduced(self, names: list[str], values: Tensor) -> Tensor:
        gathered = self.accelerator.gather(values.to(self.args.device)[None])
        columns = [
            gathered[:, at].min() if name.endswith("_min") else gathered[:, at].max() if name.endswith("_max") else gathered[:, at].sum()
            for at, name in enumerate(names)
        ]
        return torch.stack(columns)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def save_phase(self, checkpoint: Path) -> None:
        """Write the phase in progress, so that a killed run goes on in its middle."""
        state: dict[str, Any] = {
            "phase": self.phase, "done": self.done, "position": self.sampler.stream.position, "order": self._order,
            "rollout": None if self.rollout is None else vars(self.rollout), "rewards": self.sampler.rewards.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(), "update_seconds": self._update_seconds,
        }  # fmt: skip
        if self.reference is not None:
            state["reference"] = self.reference.state_dict()
        torch.save(state, checkpoint / self._state_name())

    def load_phase(self, checkpoint: Path) -> None:
        """Continue the phase of a checkpoint."""
        path = checkpoint / self._state_name()
        if not path.exists():
            return
        state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.phase, self.done, self._order = state["phase"], state["done"], state["order"]
        self.sampler.stream.position = state["position"]
        self.rollout = None if state["rollout"] is None else Rollout(**state["rollout"])
        self.sampler.rewards.load_state_dict(state["rewards"])
        self._update_seconds = state["update_seconds"]
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        if self.reference is not None and state.get("reference"):
            self.reference.load_state_dict(state["reference"])

    def _state_name(self) -> str:
        return STATE if self.accelerator.num_processes == 1 else f"{self.accelerator.process_index}.{STATE}"


class _KeepsRollouts(TrainerCallback):
    """Writes the phase into every checkpoint, and moves the reference when its time has come."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_phase(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._sync_after_step:
            self.trainer.reference.sync(self.trainer.model, self.trainer.settings.ref_model_mixup_alpha)
            self.trainer._sync_after_step = False


class _CriticGradients(TrainerCallback):
    """The critic is outside the policy's wrapper: its gradients are averaged, clipped and cleared here."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        critic = self.trainer.critic
        assert critic is not None
        critic.synchronise(self.trainer.accelerator.num_processes)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer.critic is not None
        self.trainer.critic.zero_grad()


def _wide(values: Tensor, width: int) -> Tensor:
    """[B, L] as [B, width], zero on the right."""
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))
