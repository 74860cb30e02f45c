"""What is a whole run? The top of a config file: algorithm, backend, and one section per table."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import SerializeAsAny

from aligntune.config import rl, sft
from aligntune.config.algorithms import TRAINING_CLASSES
from aligntune.config.base import Section
from aligntune.config.enums import AlgorithmType, BackendType
from aligntune.config.launch import LaunchConfig
from aligntune.config.rewards import RewardConfig, RewardModelTrainingConfig


class Schedule(NamedTuple):
    """When a run logs, evaluates and saves, under one set of names for SFT and RL."""

    log_strategy: str
    log_every: int
    eval_strategy: str
    eval_every: int
    save_strategy: str
    save_every: int
    save_total_limit: int | None
    keep_best: bool
    best_metric: str | None
    greater_is_better: bool


class RunConfig(Section):
    """What every run has."""

    algorithm: AlgorithmType
    """`sft`, `ppo`, `dpo`, `grpo`, `dapo`, `dr_grpo`, `gspo`, `neural_mirror_grpo`, `meta_es`; case, '-' and '_' do not matter."""
    backend: BackendType = BackendType.AUTO
    """`auto` (Unsloth, native, TRL: the first that can run the config), `trl`, `unsloth`, `native`."""
    fallback: bool = True
    """Whether a named backend that cannot run the config gives way to the next that can, with one log line; False: an error."""
    skip_backends: list[BackendType] = []
    """Backends that are never chosen."""
    eval_split: str | None = None
    """Split of the dataset (or of `eval_dataset`) that is evaluated on."""
    launch: LaunchConfig = LaunchConfig()
    """Several processes."""

    @property
    def has_eval(self) -> bool:
        """Whether there is evaluation data."""
        return self.eval_split is not None or getattr(self, "eval_dataset", None) is not None


class SFTRunConfig(RunConfig):
    """A supervised fine-tuning run."""

    model: sft.ModelConfig
    dataset: sft.DatasetConfig | None = None
    datasets: list[sft.DatasetConfig] = []
    """Several datasets, mixed by their `weight`; in place of `dataset`."""
    eval_dataset: sft.DatasetConfig | None = None
    """Rows to evaluate on; settings that are not given here are those of `dataset`."""
    train: sft.TrainingConfig = sft.TrainingConfig()
    evaluation: sft.EvaluationConfig = sft.EvaluationConfig()
    logging: sft.LoggingConfig = sft.LoggingConfig()

    @property
    def sources(self) -> list[sft.DatasetConfig]:
        """The training datasets, one or several."""
        return [self.dataset] if self.dataset is not None else self.datasets

    @property
    def eval_source(self) -> sft.DatasetConfig | None:
        """The evaluation dataset: `eval_dataset`, with `eval_split` if given, or that split of `dataset`."""
        return _eval_source(self.eval_dataset, self.sources, self.eval_split)

    @property
    def schedule(self) -> Schedule:
        train, logging = self.train, self.logging
        return Schedule(
            "steps", logging.log_interval, logging.eval_strategy if self.has_eval else "no", train.eval_interval,
            logging.save_strategy, train.save_interval, train.save_total_limit,
            train.load_best_model_at_end and self.has_eval and "no" not in (logging.eval_strategy, logging.save_strategy),
            train.metric_for_best_model, train.greater_is_better,
        )  # fmt: skip


class RLRunConfig(RunConfig):
    """An RL alignment run; `train` is of the algorithm's own class."""

    model: rl.ModelConfig
    dataset: rl.DatasetConfig | None = None
    datasets: list[rl.DatasetConfig] = []
    """Several datasets, mixed by their `weight`; in place of `dataset`."""
    eval_dataset: rl.DatasetConfig | None = None
    """Rows to evaluate on; settings that are not given here are those of `dataset`."""
    train: SerializeAsAny[rl.TrainingConfig]
    logging: rl.LoggingConfig = rl.LoggingConfig()
    rewards: list[RewardConfig] = []
    """Reward functions, summed by weight."""
    reward_training: RewardModelTrainingConfig | None = None
    """Train a reward model first, and use it."""

    @property
    def has_reference(self) -> bool:
        """Whether the policy is compared with a reference."""
        if self.algorithm is AlgorithmType.DPO:
            return not self.train.reference_free
        return self.train.kl_coef > 0 or getattr(self.train, "mirror_coefficient", 0.0) > 0

    @property
    def sources(self) -> list[rl.DatasetConfig]:
        """The training datasets, one or several."""
        return [self.dataset] if self.dataset is not None else self.datasets

    @property
    def eval_source(self) -> rl.DatasetConfig | None:
        """The evaluation dataset: `eval_dataset`, with `eval_split` if given, or that split of `dataset`."""
        return _eval_source(self.eval_dataset, self.sources, self.eval_split)

    @property
    def schedule(self) -> Schedule:
        train = self.train
        return Schedule(
            train.logging_strategy, train.logging_steps, train.eval_strategy if self.has_eval else "no", train.eval_interval,
            train.save_strategy, train.save_interval, train.save_total_limit,
            train.load_best_model_at_end and self.has_eval and "no" not in (train.eval_strategy, train.save_strategy),
            train.metric_for_best_model, train.greater_is_better,
        )  # fmt: skip


def _eval_source(eval_dataset: Any, sources: list[Any], eval_split: str | None) -> Any:
    source = eval_dataset
    if source is None and eval_split is not None:
        source = sources[0].model_copy(update={"percent": None, "max_samples": None})
    if source is None or eval_split is None:
        return source
    return source.model_copy(update={"split": eval_split})


def run_class(algorithm: AlgorithmType) -> type[SFTRunConfig] | type[RLRunConfig]:
    """The class of a whole run of `algorithm`."""
    return SFTRunConfig if algorithm is AlgorithmType.SFT else RLRunConfig


def section_classes(algorithm: AlgorithmType) -> dict[str, Any]:
    """Section name -> class, for the sections of `algorithm` that hold settings by name."""
    if algorithm is AlgorithmType.SFT:
        return {
            "model": sft.ModelConfig,
            "dataset": sft.DatasetConfig,
            "train": sft.TrainingConfig,
            "evaluation": sft.EvaluationConfig,
            "logging": sft.LoggingConfig,
            "launch": LaunchConfig,
        }
    return {
        "model": rl.ModelConfig,
        "dataset": rl.DatasetConfig,
        "train": TRAINING_CLASSES[algorithm],
        "logging": rl.LoggingConfig,
        "launch": LaunchConfig,
    }
