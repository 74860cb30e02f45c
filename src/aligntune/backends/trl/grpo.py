"""GRPO, DAPO, Dr. GRPO and GSPO by TRL's `GRPOTrainer`.

Prompts, rollouts and rewards are ours: TRL gets tokens through `rollout_func` (so that generation is the fast engine's, with
our prompt budget and stop tokens) and one reward function that is the run's whole reward set. The loss and the loop are TRL's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig, GRPOTrainer

from aligntune.config.enums import AlgorithmType
from aligntune.trainers.arguments import training_arguments
from aligntune.trainers.rollout_phase import PromptStream

if TYPE_CHECKING:
    from aligntune.config.run import RLRunConfig
    from aligntune.trainers.online import OnlineSession


class HeldOutGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose evaluation is ours: held-out prompts, answered greedily, scored by the task."""

    held_out: Any = None

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        found = self.held_out(self.state.global_step) if self.held_out is not None else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def algorithm_arguments(run: RLRunConfig) -> dict[str, Any]:
    """The fields of `GRPOConfig` that make TRL's loss the algorithm's."""
    train = run.train
    low, high = train.cliprange, train.cliprange_high if train.cliprange_high is not None else train.cliprange
    loss_type, level = "grpo", "token"
    if run.algorithm is AlgorithmType.DAPO:
        loss_type = "dapo"
    elif run.algorithm is AlgorithmType.DR_GRPO:
        loss_type = "dr_grpo"
    elif run.algorithm is AlgorithmType.GSPO:
        level = "sequence"  # with TRL's default loss_type `dapo`, sequences would be weighted by their lengths
        low = train.gspo_gamma if train.is_set("gspo_gamma") else low
        high = train.gspo_delta if train.is_set("gspo_delta") else high
    return {
        "loss_type": train.loss_type or loss_type,
        "importance_sampling_level": level,
        "epsilon": low,
        "epsilon_high": high,
        "beta": train.kl_coef,
        "use_bias_correction_kl": False,  # True multiplies k3 by the ratio
        "scale_rewards": train.scale_rewards,
        "mask_truncated_completions": train.mask_truncated_completions,
        "num_iterations": train.num_ppo_epochs or 1,
        "sync_ref_model": train.sync_ref_model,
        "ref_model_mixup_alpha": train.ref_model_mixup_alpha,
        "ref_model_sync_steps": train.ref_model_sync_steps,
    }


def grpo_trainer(session: OnlineSession, callbacks: Sequence[Any]) -> HeldOutGRPOTrainer:
    """The trainer of a session, with nothing left to TRL's defaults."""
    run, plan = session.config, session.plan
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func announces itself as experimental
    for sentence in session.spec.advice(run.train):
        session.recorder.note(sentence, level="warning")
    rows, texts = _rows(session)
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
            temperature=run.train.temperature,
            top_p=run.train.top_p,
            shuffle_dataset=False,
            log_completions=False,
            **algorithm_arguments(run),
        )
        trainer = HeldOutGRPOTrainer(
            model=session.model,
            reward_funcs=[_Rewards(session.rewards, texts)],
            args=arguments,
            train_dataset=rows,
            eval_dataset=None
            if session.eval_rows is None
            else session.eval_rows.rename_columns(_prompt_text(session.eval_rows)),
            processing_class=session.tokenizer,
            callbacks=list(callbacks),
            rollout_func=_Rollouts(session, texts),
        )
    trainer.held_out = session.held_out()
    return trainer


def _rows(session: OnlineSession) -> tuple[Any, dict[str, Any]]:
    """The prompts in the run's order, `prompt` being their rendered text, and what each text was made from."""
    train = session.config.train
    stream = PromptStream(session.train_rows, seed=train.data_seed)
    order = stream.draw(len(session.train_rows))
    texts = {row["prompt_text"]: row for row in order}
    rows = session.train_rows.select(stream.order(0))
    if "prompt" in rows.column_names:
        rows = rows.remove_columns("prompt")
    return rows.rename_column("prompt_text", "prompt").remove_columns(["prompt_ids", "length"]), texts


def _prompt_text(rows: Any) -> dict[str, str]:
    return {"prompt_text": "prompt"} if "prompt" not in rows.column_names else {}


class _Rollouts:
    """TRL's `rollout_func`: each prompt text to the tokens of one completion."""

    def __init__(self, session: OnlineSession, texts: dict[str, Any]) -> None:
        self.session, self.texts, self.calls = session, texts, 0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [list(self.texts[prompt]["prompt_ids"]) for prompt in prompts]
        self.calls += 1
        seed = trainer.args.seed + 7919 * self.calls + trainer.accelerator.process_index
        found = self.session.engine.generate(ids, replace(self.session.sampling, num_generations=1, seed=seed % 2**31))
        return {"prompt_ids": ids, "completion_ids": found.completion_ids, "logprobs": found.sampler_log_probs}


class _Rewards:
    """The run's reward set as one TRL reward function, given the prompts as the dataset has them."""

    __name__ = "reward"

    def __init__(self, rewards: Any, texts: dict[str, Any]) -> None:
        self.rewards, self.texts = rewards, texts

    def __call__(self, prompts: list[str], completions: list[str], completion_ids: Any = None, **columns: Any) -> Any:
        own = [self.texts[prompt].get("prompt", prompt) for prompt in prompts]
        return self.rewards(own, completions, completion_ids, **columns)
