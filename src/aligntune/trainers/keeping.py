"""Which weights are kept? Checkpoints at the best evaluation, and stopping when it no longer improves."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import ConfigError
from aligntune.trainers.parallel import first_of_all


class OneVerdict(TrainerCallback):
    """Makes the first process's value of the metric that decides that of all: each measures its own `runtime`, say, and processes
    that disagree on saving or stopping wait for each other for ever."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        name = best_name(args)
        if name in metrics:
            metrics[name] = first_of_all(metrics[name], args.device)


class SaveBest(TrainerCallback):
    """Writes a checkpoint whenever an evaluation is the best so far.

    transformers restores the best *checkpoint*: an evaluation between two checkpoints would be lost however good it was.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        name = best_name(args)
        if name not in metrics:
            known = ", ".join(sorted(key for key in metrics if key.startswith("eval_")))
            raise ConfigError(f"train.metric_for_best_model: {name} is not computed; the metrics are {known}")
        best = state.best_metric
        if best is None or (metrics[name] > best if args.greater_is_better else metrics[name] < best):
            control.should_save = True


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which forgets at a resume how many evaluations in a row were no better."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = evaluations_without_gain(state)


def evaluations_without_gain(state: Any) -> int:
    """Evaluations in a row that were no better than the best one, when `state` was saved."""
    saved = state.stateful_callbacks.get(EarlyStopping.__name__) or {}
    return int(saved.get("attributes", {}).get("early_stopping_patience_counter", 0))


def best_name(args: Any) -> str:
    """The metric that decides, as an evaluation calls it."""
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def keeping_callbacks(run: SFTRunConfig | RLRunConfig) -> list[TrainerCallback]:
    """The callbacks that the run's schedule asks for."""
    found: list[TrainerCallback] = [OneVerdict()]  # before those that decide
    if run.schedule.keep_best:
        found.append(SaveBest())
    patience = getattr(run.train, "early_stopping_patience", None)
    if patience is not None:
        found.append(EarlyStopping(patience, getattr(run.train, "early_stopping_threshold", 0.0)))
    return found
