"""The Python door: from settings to a session that can train, evaluate, predict and save."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aligntune.config.applies import ONLINE
from aligntune.config.base import Section
from aligntune.config.contradictions import MODEL_METRICS
from aligntune.config.enums import AlgorithmType
from aligntune.config.problems import Problem, is_dataset_settings, report, short
from aligntune.config.resolve import Resolved, resolve
from aligntune.config.run import RunConfig, SFTRunConfig
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.evaluation.harness import HarnessReport
    from aligntune.evaluation.saved_base import SavedEvaluation

Source = str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None


def create_sft_trainer(
    model_name: str | None = None,
    dataset_name: str | Sequence[Any] | None = None,
    backend: str | None = None,
    config: Source = None,
    **settings: Any,
) -> Any:
    """A session for supervised fine-tuning.

    `settings` are the names of the parameter reference, flat (`learning_rate=2e-4, lora_r=8`) or by section
    (`train={"learning_rate": 2e-4}`); `config` is a YAML file, a nested dict or a run's `config` that they are laid over. A
    list of `dataset_name`s is mixed. Raises `ConfigError` with all problems, and `BackendError` when no backend can run it.

        trainer = create_sft_trainer("Qwen/Qwen2.5-0.5B", "tatsu-lab/alpaca", num_epochs=1, output_dir="./output")
        trainer.train()
        trainer.predict(["What is the capital of France?"])
    """
    return _session(resolve(config, arguments=_given(model_name, dataset_name, backend, settings), algorithm="sft"))


def create_rl_trainer(
    model_name: str | None = None,
    dataset_name: str | Sequence[Any] | None = None,
    algorithm: str | AlgorithmType | None = None,
    backend: str | None = None,
    reward_functions: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
    reward_function_weights: Sequence[float] | None = None,
    config: Source = None,
    **settings: Any,
) -> Any:
    """A session for RL alignment: `ppo`, `dpo`, `grpo`, `dapo`, `dr_grpo`, `gspo`, `neural_mirror_grpo`, `meta_es`.

    `reward_functions` are names of built-in rewards, callables, or `module:function` addresses (one or a list), summed by
    `reward_function_weights` (1 each while unset); `rewards` takes the full entries instead. Everything else as in
    `create_sft_trainer`.
    """
    arguments = _given(model_name, dataset_name, backend, settings)
    if algorithm is not None:
        arguments["algorithm"] = algorithm
    if reward_functions is not None:
        if "rewards" in settings:
            raise ConfigError("give reward_functions or rewards, not both")
        arguments["rewards"] = _weighted(reward_functions, reward_function_weights)
    elif reward_function_weights is not None:
        raise ConfigError("reward_function_weights needs reward_functions")
    resolved = resolve(config, arguments=arguments)
    if resolved.config.algorithm is AlgorithmType.SFT:
        raise ConfigError("algorithm: is sft; create_sft_trainer trains that")
    return _session(resolved)


def create_trainer(config: Source = None, *, overrides: Iterable[str] = (), **arguments: Any) -> Any:
    """A session for whatever `algorithm` the config names; `overrides` are command-line spellings (`epochs=1`)."""
    return _session(resolve(config, arguments=arguments, overrides=overrides))


def evaluate(
    model: str,
    data: str,
    *,
    task: str | None = None,
    metrics: Sequence[Any] | None = None,
    limit: int | None = None,
    overrides: Iterable[str] = (),
    **settings: Any,
) -> SavedEvaluation:
    """Measure a saved model (run folder, model or adapter folder, hub name) on rows; returns metrics and predictions.

    `task` is found from the model and the rows while unset: a task type, or "preference". `metrics` are names
    (`perplexity`, `rouge`, `bleu`, ...; for classifiers `accuracy`, `f1`, ...) or functions. `limit` caps the rows.
    `settings` and `overrides` are those of supervised fine-tuning: `split="test"`, `precision="fp32"`, `batch_size=16`.

        found = evaluate("output/model", "test.jsonl")
        found.metrics["perplexity"]; found.write_predictions("predictions.jsonl")
    """
    from aligntune.evaluation.saved import evaluate_saved
    from aligntune.trainers.quiet import quiet_libraries

    quiet_libraries()
    run = evaluation_run(model, data, task=task, metrics=metrics, limit=limit, overrides=overrides, **settings)
    return evaluate_saved(run, task=task, metrics=metrics)


def evaluate_harness(
    model: str, tasks: Sequence[str], *, limit: int | None = None, overrides: Iterable[str] = (), **settings: Any
) -> HarnessReport:
    """Public benchmarks of lm-evaluation-harness (extra `harness`) on a saved model; `limit` rows of each task."""
    from aligntune.evaluation.harness import run_harness
    from aligntune.evaluation.saved_base import batch_size, load_for_evaluation
    from aligntune.trainers.quiet import quiet_libraries

    quiet_libraries()
    run = evaluation_run(model, "harness", overrides=overrides, **settings)  # no rows of ours are read
    loaded, tokenizer = load_for_evaluation(run)
    return run_harness(loaded, tokenizer, tasks, batch_size=batch_size(run), limit=limit, seed=run.train.seed)


def evaluation_run(
    model: str, data: str, *, task: str | None = None, metrics: Sequence[Any] | None = None, limit: int | None = None,
    overrides: Iterable[str] = (), **settings: Any,
) -> SFTRunConfig:  # fmt: skip
    """The config of an evaluation: of the model, the rows and how they are read. Raises `ConfigError`."""
    from aligntune.evaluation.saved import PREFERENCE, evaluation_defaults
    from aligntune.models.files import model_folder

    given = _given(model_folder(model), data, None, settings)
    tree = evaluation_defaults(model_folder(model), None if task == PREFERENCE else task, limit)
    tree["evaluation"] = {f"compute_{name}": True for name in MODEL_METRICS if name in (metrics or ())}
    resolved = resolve(tree, arguments=given, overrides=overrides, algorithm="sft")
    _refuse_settings_of_training(resolved)
    assert isinstance(resolved.config, SFTRunConfig), "resolved as sft"
    return resolved.config


EVALUATED_BY = {
    "per_device_batch_size", "seed", "dataset_kwargs", "dataset_num_proc", "completion_only_loss", "assistant_only_loss", "bf16",
    "fp16", "use_flash_attention_2",
}  # fmt: skip
"""The settings of `train` that an evaluation reads."""


def _refuse_settings_of_training(resolved: Resolved) -> None:
    problems = [
        Problem(path, "has no effect on an evaluation: leave it out", origin)
        for path, origin in resolved.origins.items()
        if len(path) > 1 and origin.kind in ("argument", "override")
        and (path[0] in ("logging", "launch") or (path[0] == "train" and path[1] not in EVALUATED_BY))
    ]  # fmt: skip
    if problems:
        raise ConfigError(report(problems))


def _given(model_name: Any, dataset_name: Any, backend: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(settings)
    if model_name is not None:
        arguments["model_name"] = model_name
    for name, given in (("dataset_name", dataset_name), *((key, settings.get(key)) for key in ROWS)):
        _refuse_rows(name, given)
    if isinstance(dataset_name, (list, tuple)):
        arguments["datasets"] = list(dataset_name)
    elif dataset_name is not None:
        arguments["dataset_name"] = dataset_name
    if backend is not None:
        arguments["backend"] = backend
    return arguments


ROWS = ("dataset", "datasets", "eval_dataset")


def _refuse_rows(name: str, given: Any) -> None:
    """Rows in memory are refused: a run must be able to read them again, in other processes and when it resumes."""
    items = given if isinstance(given, (list, tuple)) else [given]
    for item in items:
        is_settings = isinstance(item, Section) or (isinstance(item, Mapping) and is_dataset_settings(item))
        if item is not None and not is_settings and not isinstance(item, (str, os.PathLike)):
            raise ConfigError(
                f"{name}: should be a file, folder or hub name, or its settings by name, got {short(item, 60)}. Rows in memory "
                "are not taken, since a run must be able to read them again: write them to a file first "
                "(datasets.Dataset.to_json('rows.jsonl'); pandas: frame.to_json('rows.jsonl', orient='records', lines=True))"
            )


def _weighted(functions: Any, weights: Any) -> list[dict[str, Any]]:
    if isinstance(functions, str) or callable(functions):
        functions = [functions]
    if isinstance(functions, Mapping) or not isinstance(functions, Iterable):
        raise ConfigError(f"reward_functions: should be a list of names and functions, got {functions!r}")
    functions = list(functions)
    if weights is None:
        weights = [1.0] * len(functions)
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, Iterable):
        raise ConfigError(f"reward_function_weights: should be a list of numbers, got {weights!r}")
    weights = list(weights)
    if len(weights) != len(functions):
        raise ConfigError(f"reward_function_weights has {len(weights)} entries for {len(functions)} reward_functions")
    for function in functions:
        if isinstance(function, Mapping):
            raise ConfigError(f"reward_functions: {function!r} is a whole entry: give those as rewards=[...]")
    return [{"type": function, "weight": weight} for function, weight in zip(functions, weights)]


def _session(resolved: Resolved) -> Any:
    from aligntune.backends.launch.session import is_launched, launched_session, unsloth_session
    from aligntune.backends.select import choose

    backend, reasons = choose(resolved.config)
    if resolved.config.launch.is_active and not is_launched():
        return launched_session(resolved, backend, reasons)
    if backend.name == "unsloth":
        return unsloth_session(resolved, backend, reasons)
    return session_class(resolved)(resolved, backend, reasons)


def session_class(resolved: Resolved) -> type[Any]:
    """The kind of session that runs a config."""
    if resolved.config.algorithm is AlgorithmType.SFT:
        if resolved.config.sources[0].task_type.is_classification:  # type: ignore[attr-defined]
            from aligntune.trainers.classify import ClassificationSession

            return ClassificationSession
        from aligntune.trainers.sft import SFTSession

        return SFTSession
    if resolved.config.algorithm is AlgorithmType.META_ES:
        from aligntune.trainers.meta_es import MetaESSession

        return MetaESSession
    if resolved.config.algorithm in ONLINE:
        from aligntune.trainers.online import OnlineSession

        return OnlineSession
    from aligntune.trainers.pairs import PairsSession

    return PairsSession
