"""A metric that no evaluation gives, and a schedule that would look at none, are refused with the config."""

from __future__ import annotations

import re
from typing import Any

import pytest

from aligntune.config.best_metric import metrics_of
from aligntune.config.resolve import Resolved, resolve
from aligntune.errors import ConfigError

EVALUATED = {"eval_split": "test", "eval_strategy": "steps", "load_best_model_at_end": True}


def resolved(algorithm: str, **settings: Any) -> Resolved:
    base: dict[str, Any] = {"model": "m", "dataset": "d"} | (
        {} if algorithm in ("sft", "dpo") else {"rewards": ["length"]}
    )
    return resolve(base, arguments=settings, algorithm=algorithm)


@pytest.mark.parametrize(("algorithm", "name", "near", "more"), [
    ("sft", "eval_rougel", "eval_rougeL", {}),
    ("sft", "eval_acuracy", "eval_accuracy", {"task_type": "text_classification"}),
    ("sft", "percision", "eval_precision", {"task_type": "token_classification"}),
    ("dpo", "eval_rewards/accuracy", "eval_rewards/accuracies", {}),
    ("dpo", "eval_los", "eval_loss", {}),
    ("grpo", "eval_rewrad", "eval_reward", {}),
    ("ppo", "pass@2", "eval_pass@1", {}),
])  # fmt: skip
def test_an_unknown_metric_is_refused_with_the_nearest(
    algorithm: str, name: str, near: str, more: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"gives {name!r}; did you mean {near}? It gives eval_")):
        resolved(algorithm, **EVALUATED, **more, metric_for_best_model=name)


@pytest.mark.parametrize(("algorithm", "name", "more"), [
    ("sft", "rougeL", {}), ("sft", "eval_loss", {}), ("sft", "mine", {"custom_metrics": ["my.py:fn"]}),
    ("sft", "eval_matthews_correlation", {"task_type": "token_classification"}),
    ("sft", "eval_meteor", {"compute_meteor": True}), ("dpo", "eval_loss/hinge", {"loss_type": "hinge"}),
    ("dpo", "eval_loss/nll", {"rpo_alpha": 1.0}), ("dpo", "kl/chosen", {}),
    ("dpo", "zero_shot_rougeL", {"dpo_eval_enabled": True, "dpo_few_shot_max_samples": 0}),
    ("grpo", "eval_pass@1", {}), ("grpo", "eval_rewards/length/mean", {}), ("dapo", "eval_rewards/my_reward_2/accuracy", {}),
])  # fmt: skip
def test_a_metric_of_the_run_is_taken(algorithm: str, name: str, more: dict[str, Any]) -> None:
    assert resolved(algorithm, **EVALUATED, **more, metric_for_best_model=name).config.schedule.best_metric == name


@pytest.mark.parametrize(("algorithm", "name", "more"), [
    ("sft", "eval_meteor", {}), ("sft", "eval_perplexity", {"compute_perplexity": False}),
    ("sft", "eval_accuracy", {}), ("dpo", "kl/chosen", {"reference_free": True}), ("dpo", "eval_reward", {}),
    ("dpo", "eval_rewards/length/mean", {}), ("dpo", "zero_shot_bleu", {}), ("grpo", "eval_loss", {}),
    ("sft", "eval_meteor", {"early_stopping_patience": 2, "save_strategy": "no", "load_best_model_at_end": False}),
])  # fmt: skip
def test_a_metric_that_is_switched_off_is_refused(algorithm: str, name: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"train\.metric_for_best_model: no evaluation of this run gives '{name}'"):
        resolved(algorithm, **EVALUATED | more, metric_for_best_model=name)


def test_perplexity_is_given_where_it_is_on() -> None:
    assert "perplexity" in metrics_of(resolved("sft").config)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("algorithm", "more", "message"), [
    ("sft", {}, "needs evaluation data: give eval_dataset or eval_split"),
    ("dpo", {"eval_split": "test"}, "needs evaluations: set eval_strategy to steps or epoch"),
    ("grpo", EVALUATED, "takes a lower metric for better, and more is better for eval_reward: use another schedule"),
    ("sft", EVALUATED | {"metric_for_best_model": "bleu"},
     "takes a lower metric for better, and more is better for bleu: use metric_for_best_model eval_loss, or another schedule"),
])  # fmt: skip
def test_a_schedule_of_a_metric_needs_one(algorithm: str, schedule: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"train.lr_scheduler: {schedule} {message}")):
        resolved(algorithm, lr_scheduler=schedule, **more)


@pytest.mark.parametrize(("algorithm", "name", "less"), [
    ("sft", "eval_loss", True), ("sft", "perplexity", True), ("sft", "eval_bleu", False),
    ("dpo", "eval_loss/hinge", True), ("dpo", "loss/nll", True), ("dpo", "eval_rewards/margins", False),
    ("grpo", "completions/truncated_share", True), ("grpo", "eval_pass@1", False),
])  # fmt: skip
def test_which_of_two_values_of_a_metric_is_better(algorithm: str, name: str, less: bool) -> None:
    more: dict[str, Any] = {"loss_type": "hinge", "rpo_alpha": 1.0} if algorithm == "dpo" else {}
    given: dict[str, Any] = EVALUATED | more | {"metric_for_best_model": name}
    assert resolved(algorithm, **given).config.schedule.greater_is_better is not less
    assert resolved(algorithm, **given, greater_is_better=less).config.schedule.greater_is_better is less


def test_a_metric_that_nobody_looks_at_is_one_problem() -> None:
    """What is derived from it is none of the user's."""
    with pytest.raises(ConfigError) as raised:
        resolved("grpo", metric_for_best_model="eval_reward")
    assert "metric_for_best_model: has no effect" in str(raised.value)
    assert "greater_is_better" not in str(raised.value)


def test_a_schedule_of_a_metric_may_name_it() -> None:
    settings: dict[str, Any] = {"eval_split": "test", "eval_strategy": "steps", "metric_for_best_model": "eval_loss"}
    run = resolved("dpo", lr_scheduler="greedy", **settings).config
    assert (run.schedule.best_metric, run.schedule.greater_is_better) == ("eval_loss", False)


@pytest.mark.parametrize(("schedule", "setting", "value"), [
    ("constant", "warmup_steps", 5), ("constant", "warmup_ratio", 0.2), ("greedy", "warmup_steps", 5),
])  # fmt: skip
def test_a_warm_up_that_the_schedule_leaves_out_is_refused(schedule: str, setting: str, value: float) -> None:
    given: dict[str, Any] = EVALUATED | {"lr_scheduler": schedule, setting: value}
    with pytest.raises(ConfigError, match=rf"train\.{setting}: has no effect with lr_scheduler {schedule}"):
        resolved("sft", **given)
    resolved("sft", **given | {setting: 0})
