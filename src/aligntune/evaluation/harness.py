"""How does the model do on public benchmarks? lm-evaluation-harness, through its Python API (extra `harness`)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.errors import ConfigError, require


@dataclass(frozen=True)
class HarnessReport:
    """`metrics` by "task/metric" (with ",filter" behind it where a task has several answers filters), their standard
    errors under the same names, and the harness's own result dict."""

    metrics: dict[str, float]
    errors: dict[str, float]
    raw: dict[str, Any]


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    task_folder: str | Path | None = None,
    seed: int = 0,
) -> HarnessReport:
    """Run harness `tasks` on a loaded model, where it is.

    `limit`: rows per task. `num_fewshot`: examples in the prompt (default: the task's own). `apply_chat_template`: for
    chat models. `task_folder`: a folder with further task files. Most tasks download their data.

    Raises:
        MissingExtra: lm-evaluation-harness is not installed.
        ConfigError: no task, or an unknown one.
    """
    if not tasks:
        raise ConfigError("name at least one harness task, e.g. hellaswag")
    lm_eval = require("lm_eval", extra="harness", why="benchmark tasks")
    manager = require("lm_eval.tasks", extra="harness").TaskManager(
        include_path=str(task_folder) if task_folder else None
    )
    _check_tasks(tasks, manager)
    wrapped = require("lm_eval.models.huggingface", extra="harness").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size
    )
    results = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return _report(results)


def _check_tasks(tasks: Sequence[str], manager: Any) -> None:
    for task in tasks:
        if not manager.match_tasks([task]):
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            raise ConfigError(f"lm-evaluation-harness has no task {task!r}: {hint}")


def _report(results: dict[str, Any]) -> HarnessReport:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task, scores in results["results"].items():
        for key, value in scores.items():
            name, _, filtered = key.partition(",")
            if not filtered or isinstance(value, str):  # the task's alias and other labels; "N/A" errors
                continue
            target = errors if name.endswith("_stderr") else metrics
            suffix = "" if filtered == "none" else f",{filtered}"
            target[f"{task}/{name.removesuffix('_stderr')}{suffix}"] = float(value)
    return HarnessReport(metrics, errors, results)
