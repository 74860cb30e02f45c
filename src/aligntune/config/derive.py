"""Which values follow from others? Defaults that depend on the algorithm and on the rest of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from aligntune.config.algorithms import MetaESConfig
from aligntune.config.applies import GROUP_RELATIVE
from aligntune.config.best_metric import goes_by_metric, less_is_better
from aligntune.config.enums import AlgorithmType as A
from aligntune.config.rewards import RewardConfig
from aligntune.config.rl import TrainingConfig
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.config.synonyms import Path


def derived(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, Any, str]]:
    """(path, value, why) of unset settings whose value follows from the rest of the run."""
    yield from _save_at_evaluations(config)
    metric = config.train.metric_for_best_model
    given = config.train.is_set("metric_for_best_model") and goes_by_metric(config)
    if metric and given and not config.train.is_set("greater_is_better"):
        lower = less_is_better(metric)
        yield ("train", "greater_is_better"), not lower, f"{'less' if lower else 'more'} is better for {metric}"
    model = config.model
    if (
        model.selective_checkpointing != "off"
        and not model.is_set("gradient_checkpointing")
        and model.gradient_checkpointing
    ):
        yield ("model", "gradient_checkpointing"), False, "selective_checkpointing takes its place"
    if isinstance(config, RLRunConfig):
        yield from _rl(config)
        yield from _own_defaults(config.train)


def _save_at_evaluations(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, Any, str]]:
    """Keeping the best model needs a checkpoint at evaluations: the two intervals must fit."""
    schedule, train = config.schedule, config.train
    unfit = schedule.eval_strategy == schedule.save_strategy == "steps" and schedule.save_every % schedule.eval_every
    if schedule.keep_best and unfit and not train.is_set("save_interval"):
        fitting = -(-schedule.save_every // schedule.eval_every) * schedule.eval_every
        yield ("train", "save_interval"), fitting, "a multiple of eval_interval, to keep the best model"


def _rl(config: RLRunConfig) -> Iterator[tuple[Path, Any, str]]:
    train, algorithm = config.train, config.algorithm
    if train.epochs is None and train.max_steps is None:
        yield ("train", "epochs"), 1, "epochs and max_steps are both unset"
    if goes_by_metric(config) and train.metric_for_best_model is None:
        metric = "eval_rewards/accuracies" if algorithm is A.DPO else "eval_reward"
        yield ("train", "metric_for_best_model"), metric, "the algorithm's own measure"
        if not train.is_set("greater_is_better"):
            yield ("train", "greater_is_better"), True, f"more is better for {metric}"
    if algorithm is A.DPO:
        return
    if not config.rewards and not reward_models(config) and _scores_itself(config):
        yield ("rewards",), [RewardConfig(type="reasoning_gym")], "the tasks come with their scorer"
    if algorithm is A.PPO and not train.is_set("max_completion_length"):
        yield ("train", "max_completion_length"), train.response_length, "response_length of PPO"
    if algorithm in GROUP_RELATIVE:
        yield from _group_relative(config)


def _own_defaults(train: TrainingConfig) -> Iterator[tuple[Path, Any, str]]:
    """What the algorithm has in place of the common defaults; null asks for the default too."""
    for name, (value, why) in train.own_defaults.items():
        if not train.is_set(name) or getattr(train, name) is None:
            yield ("train", name), value, why
    for name, field in type(train).model_fields.items():
        if name == "loss_type" and train.loss_weights:
            continue  # null says that they take its place
        if getattr(train, name) is None and field.default is not None:
            yield ("train", name), field.default, "the default, asked for by null"


def _group_relative(config: RLRunConfig) -> Iterator[tuple[Path, Any, str]]:
    train = config.train
    batch, group = train.per_device_batch_size, train.num_generations
    if group is None:
        group, why = (batch, "per_device_batch_size") if batch >= 2 else (8, "per_device_batch_size is below 2")
        yield ("train", "num_generations"), group, why
    step = batch * train.gradient_accumulation_steps
    if step % group and not (train.is_set("gradient_accumulation_steps") or train.is_set("rollout_batch_size")):
        fitting = group // math.gcd(batch, group)
        yield ("train", "gradient_accumulation_steps"), fitting, f"a step holds whole groups of {group} completions"
    if isinstance(train, MetaESConfig) and train.target != "mirror" and not train.is_set("init_scale"):
        yield ("train", "init_scale"), 0.0, "the first centre is the reward as given"


def assign(config: Any, path: Path, value: Any) -> None:
    """Set a value deep in a run."""
    for part in path[:-1]:
        config = config[part] if isinstance(part, int) else getattr(config, str(part))
    setattr(config, str(path[-1]), value)


def reward_models(config: RLRunConfig) -> list[str]:
    """The settings that name a reward model."""
    names = ("reward_path", "reward_model_name", "reward_model_source")
    return [name for name in names if getattr(config.model, name) is not None]


def _scores_itself(config: RLRunConfig) -> bool:
    """Whether every dataset is of generated tasks, which come with a scorer."""
    return bool(config.sources) and all(source.name.startswith("reasoning_gym:") for source in config.sources)
