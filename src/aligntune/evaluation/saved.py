"""How good is a saved model on these rows? Loads a model or adapter and measures it as its kind and the rows allow.

Language models: perplexity, and metrics of greedy answers where the rows have answers; on preference pairs, which side is
likelier. Classifiers (known by their config): accuracy, F1, correlation, entities. Reward models: how often the chosen
answer gets the higher score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aligntune.config.enums import TaskType
from aligntune.config.run import SFTRunConfig
from aligntune.data import load_rows
from aligntune.data.sources import column_names
from aligntune.errors import ConfigError
from aligntune.evaluation import saved_labels, saved_text
from aligntune.evaluation.saved_base import PREFERENCE, SavedEvaluation
from aligntune.models.heads import SavedHead, saved_head


def evaluation_defaults(name: str, task: str | None, limit: int | None) -> dict[str, Any]:
    """Settings of an evaluation that the user has not given: column names are looked for."""
    head = saved_head(name)
    if task is None and head is not None and len(head.names) > 1:
        task = head.task.value
    dataset: dict[str, Any] = {"auto_detect_fields": True} | ({"task_type": task} if task else {})
    if limit is not None:
        dataset["max_samples"] = limit
    return {"dataset": dataset}


def evaluate_saved(run: SFTRunConfig, *, task: str | None = None, metrics: Sequence[str] | None = None) -> SavedEvaluation:  # fmt: skip
    """Measure the model of `run` on its dataset.

    `task`: a task type or "preference"; unset, it is found from the model's head and the rows' columns. `metrics`: names
    or addresses of functions, in place of those that `run.evaluation` asks for.

    Raises:
        ConfigError: an unknown task or metric, or one that the model cannot do.
        DataError: rows that do not fit the task, or labels that a classifier does not know.
    """
    head = saved_head(run.model.name_or_path)
    source = run.sources[0]
    if source.streaming:
        raise ConfigError(
            "dataset.streaming: an evaluation reads its rows whole; leave it out, and cap the rows with limit"
        )
    rows = load_rows(source, seed=run.train.seed, load_kwargs=run.train.dataset_kwargs)
    task = task or _task(head, column_names(rows))
    if task != PREFERENCE and TaskType(task).is_classification:
        if head is None or head.task is not TaskType(task):
            raise ConfigError(f"{run.model.name_or_path} has no head for {task}: train one, or choose another task")
        return saved_labels.evaluate_classifier(run, rows, head, metrics)
    if head is not None and not (task == PREFERENCE and len(head.names) == 1):
        raise ConfigError(f"{run.model.name_or_path} is a classifier ({head.task.value}); it cannot do {task}")
    if task == PREFERENCE:
        return saved_text.evaluate_pairs(run, rows, reward_model=head is not None)
    return saved_text.evaluate_answers(run, rows, saved_text.chosen_metrics(run.evaluation, metrics), task)


def _task(head: SavedHead | None, columns: Sequence[str]) -> str:
    if head is not None:
        return PREFERENCE if len(head.names) == 1 else head.task.value
    return PREFERENCE if {"chosen", "rejected"} <= set(columns) else TaskType.SUPERVISED_FINE_TUNING.value
