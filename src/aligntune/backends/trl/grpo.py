"""GRPO, DAPO, Dr. GRPO and GSPO by TRL's `GRPOTrainer`.

Prompts, rollouts, rewards and evaluation are ours: TRL gets tokens through `rollout_func` (so that generation is the fast
engine's, with our prompt budget and stop tokens), one reward function that is the run's whole reward set, and prompts in the run's
order. The loss and the loop are TRL's. Its dataset holds row numbers as prompts; what they stand for is looked up in the session.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from aligntune.algorithms.gspo import sequence_clip
from aligntune.algorithms.policy import clip_range
from aligntune.config.algorithms import GSPOConfig
from aligntune.config.enums import AlgorithmType
from aligntune.models.lora import is_tied, untie
from aligntune.trainers.arguments import training_arguments
from aligntune.trainers.online_metrics import Meter, of_all_processes
from aligntune.trainers.online_state import STATE, own_name, write
from aligntune.trainers.rollout_phase import length_metrics, reward_arguments, with_headline

if TYPE_CHECKING:
    from aligntune.config.run import RLRunConfig
    from aligntune.trainers.online import OnlineSession

logger = logging.getLogger(__name__)

OUR_NAMES = {
    "clip_ratio/low_mean": "clip_fraction_low",
    "clip_ratio/high_mean": "clip_fraction_high",
    "frac_reward_zero_std": "zero_variance_groups",
    "step_time": "perf/step_seconds",
}
DROPPED = ("rewards/reward/", "clip_ratio/", "completions/", "reward_std", "sampling/")
"""Beginnings of metrics that ours say better, or that the native trainer has not got."""


class OurMetrics(Trainer):
    """Comes after TRL's class: gives its training metrics the names of the native trainer, and adds those of the rollouts of
    all processes."""

    meter: Meter

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            renamed = {OUR_NAMES.get(name, name): value for name, value in logs.items()}
            logs.clear()
            ours = of_all_processes(self.meter.pop(), self.accelerator)
            logs.update({name: value for name, value in renamed.items() if not name.startswith(DROPPED)} | ours)
        super().log(logs, *args, **kwargs)


class SessionGRPOTrainer(GRPOTrainer, OurMetrics):
    """`GRPOTrainer` with the session's prompt order, held-out evaluation and metrics. `session` is set right after init."""

    session: OnlineSession
    held_out: Any = None

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, batch_sampler=PhaseRows(self), collate_fn=list)  # type: ignore[arg-type]

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, (str, Path)):
            self._restore(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def collected(self) -> dict[str, Any]:
        """What a checkpoint needs beside TRL's own files, as the native trainer writes it."""
        phase = self.state.global_step // self.session.plan.steps
        reference = self.accelerator.unwrap_model(self.ref_model) if self.args.sync_ref_model else None
        return {
            "phase": phase, "done": 0, "order": None, "position": phase * self.session.stream().phase, "rollout": None,
            "tokens": self.state.num_input_tokens_seen if self.is_world_process_zero() else 0,
            "rewards": self.session.rewards.state_dict(), "critic": None, "critic_optimizer": None,
            "reference": {} if reference is None else reference.state_dict(),
        }  # fmt: skip

    def _restore(self, checkpoint: Path) -> None:
        files = [checkpoint / own_name(self.args), *sorted(checkpoint.glob(f"*{STATE}"))]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            logger.warning("%s holds no %s: running means of rewards begin anew", checkpoint, STATE)
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.session.rewards.load_state_dict(state["rewards"])
        if state["reference"] and self.ref_model is not None:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        found = self.held_out(self.state.global_step) if self.held_out is not None else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.model.eval()  # or TRL takes these for training metrics
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class PhaseRows:
    """Row numbers of each phase of a pass, a prompt's completions side by side. TRL draws them for every micro-batch, and
    generates at the first of a phase."""

    def __init__(self, trainer: SessionGRPOTrainer) -> None:
        self.trainer, self.plan, self.stream = trainer, trainer.session.plan, trainer.session.stream()
        self.phases = self.plan.phases(len(self.stream), self.stream.world)

    def __len__(self) -> int:
        return self.phases * self.plan.steps * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        passes = self.trainer.state.global_step // (self.phases * self.plan.steps)
        for phase in range(passes * self.phases, (passes + 1) * self.phases):
            places = self.stream.places(phase * self.stream.phase, self.stream.phase)
            rows = [place for place in places for _ in range(self.plan.group)]
            for _ in range(self.plan.steps * self.plan.accumulation):
                yield rows


def algorithm_arguments(run: RLRunConfig) -> dict[str, Any]:
    """The fields of `GRPOConfig` that make TRL's loss the algorithm's."""
    train = run.train
    low, high = clip_range(train)
    loss_type, level = "grpo", "token"
    if run.algorithm is AlgorithmType.DAPO:
        loss_type = "dapo"
    elif run.algorithm is AlgorithmType.DR_GRPO:
        loss_type = "dr_grpo"
    elif isinstance(train, GSPOConfig):
        level = "sequence"  # with TRL's default loss_type `dapo`, sequences would be weighted by their lengths
        low, high = sequence_clip(train)
    return {
        "loss_type": train.loss_type or loss_type,
        "importance_sampling_level": level,
        "epsilon": low,
        "epsilon_high": high,
        "delta": None,
        "beta": train.kl_coef,
        "use_bias_correction_kl": False,  # True multiplies k3 by the ratio
        "scale_rewards": train.scale_rewards,
        "multi_objective_aggregation": "sum_then_normalize",
        "mask_truncated_completions": train.mask_truncated_completions,
        "num_iterations": train.num_ppo_epochs,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "off_policy_mask_threshold": None,
        "sync_ref_model": train.sync_ref_model,
        "ref_model_mixup_alpha": train.ref_model_mixup_alpha,
        "ref_model_sync_steps": train.ref_model_sync_steps,
    }


def grpo_trainer(session: OnlineSession, callbacks: Sequence[Any]) -> SessionGRPOTrainer:
    """The trainer of a session, with nothing left to TRL's defaults."""
    run, plan, model = session.config, session.plan, session.model
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func announces itself as experimental
    model.generation_config.eos_token_id = list(session.stop_token_ids)  # by them TRL tells what was truncated
    meter = Meter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        arguments = training_arguments(
            run,
            session.directory.checkpoints,
            session.precision,
            cls=GRPOConfig,
            max_steps=session.optimizer_steps(),
            remove_unused_columns=False,
            disable_dropout=run.model.disable_dropout,
            num_generations=plan.group,
            num_generations_eval=1,
            steps_per_generation=plan.completions // plan.micro,
            max_completion_length=run.train.max_completion_length,
            temperature=session.sampling.temperature or 1.0,
            top_p=run.train.top_p,
            shuffle_dataset=False,
            use_vllm=False,
            log_completions=False,
            **algorithm_arguments(run),
        )
        trainer = SessionGRPOTrainer(
            model=model,
            reward_funcs=[_Rewards(session, meter)],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [str(at) for at in range(len(session.train_rows))]}),
            eval_dataset=None if session.eval_rows is None else Dataset.from_dict({"prompt": ["0"]}),  # ours evaluates
            processing_class=session.tokenizer,
            callbacks=list(callbacks),
            rollout_func=_Rollouts(session, meter),
        )
    trainer.session, trainer.meter, trainer.held_out = session, meter, session.held_out()
    trainer.add_callback(_OnlineParts(trainer))
    _use_our_reference(trainer)
    return trainer


def _use_our_reference(trainer: SessionGRPOTrainer) -> None:
    """Give TRL's reference the policy's weights: TRL reads them from the folder that the policy came from, and misses what was
    done to it since (merged adapters, new tokens)."""
    if trainer.ref_model is None:
        return
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    if is_tied(reference) and not is_tied(trainer.model):
        untie(reference)
    rows = trainer.model.get_input_embeddings().weight.shape[0]
    if reference.get_input_embeddings().weight.shape[0] != rows:
        reference.resize_token_embeddings(rows)
    reference.load_state_dict(trainer.model.state_dict())


class _Rollouts:
    """TRL's `rollout_func`: prompts (row numbers, those of a group side by side) to tokens of one completion each."""

    def __init__(self, session: OnlineSession, meter: Meter) -> None:
        self.session, self.meter = session, meter

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        plan, accelerator = self.session.plan, trainer.accelerator
        ids = [list(self.session.train_rows[int(prompt)]["prompt_ids"]) for prompt in prompts[:: plan.group]]
        phase = trainer.state.global_step // plan.steps
        seed = trainer.args.seed + 7919 * (phase * accelerator.num_processes + accelerator.process_index)
        found = self.session.engine.generate(ids, replace(self.session.sampling, seed=seed % 2**31))
        self.meter.add(length_metrics(found))
        every = [prompt for prompt in ids for _ in range(plan.group)]
        return {"prompt_ids": every, "completion_ids": found.completion_ids, "logprobs": found.sampler_log_probs}


class _Rewards:
    """The run's reward set as one TRL reward function."""

    __name__ = "reward"

    def __init__(self, session: OnlineSession, meter: Meter) -> None:
        self.session, self.meter = session, meter

    def __call__(self, prompts: list[str], completions: list[str], completion_ids: Any, **_: Any) -> list[float | None]:
        rows = [self.session.train_rows[int(prompt)] for prompt in prompts]
        scores = self.session.rewards.score(*reward_arguments(rows, completion_ids, self.session.tokenizer, 1))
        self.meter.add(with_headline(scores.metrics))
        return scores.total


class _OnlineParts(TrainerCallback):
    """Keeps running means of rewards and a reference that moves with checkpoints, and takes TRL's reference adapter off when training ends."""

    def __init__(self, trainer: SessionGRPOTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write(self.trainer.collected(), args, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if "ref" in getattr(model, "peft_config", {}):
            model.delete_adapter("ref")
