"""Which reward model does a run use? By folder, by hub name, by its full source, or one that is trained first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligntune.config.dump import section_to_yaml
from aligntune.config.rewards import RewardModelTrainingConfig
from aligntune.errors import ConfigError
from aligntune.reporting import RunDirectory
from aligntune.rewards.model import RewardModel, load

ASKED = "reward_training.yaml"
"""Beside a model that is trained for a run: from what. A run that asks for the same again takes the model, or goes on with
a training that was cut off."""


def reward_model_of(config: Any) -> RewardModel | None:
    """The reward model that an online run names, loaded on `reward_device`; None when it names none.

    Where the run asks for training (`reward_training`, `custom_trained`, `fine_tune_with_rewards`) it happens here, once:
    a model that was trained from the same settings before is loaded instead.

    Raises:
        ConfigError: `reward_training` beside another reward model, or training in a run of several processes.
    """
    model = config.model
    source = model.reward_model_source
    name = model.reward_path or model.reward_model_name
    training = config.reward_training
    if training is not None and (name is not None or source is not None):
        raise ConfigError("reward_training trains the reward model, and reward_path, reward_model_name or reward_model_source names another: keep one")  # fmt: skip
    if source is not None:
        name, training = source.model_path or source.model_name, source.training_config
    if training is not None:
        name = str(trained_folder(training, start=name, trust_remote_code=model.trust_remote_code))
    if name is None:
        return None
    return load(
        name,
        device=model.reward_device,
        quantization=model.reward_model_quantization or None,
        trust_remote_code=model.trust_remote_code,
    )


def trained_folder(training: RewardModelTrainingConfig, *, start: str | None, trust_remote_code: bool = False) -> Path:
    """Train (or find again) the model of `training`; `start`: a pretrained reward model to begin with, in place of its base."""
    from aligntune.trainers.reward_model import train_on_texts

    if start is not None:
        training = training.model_copy(update={"base_model_name": start})
    run = RunDirectory(training.output_dir)
    asked, text = run.path / ASKED, section_to_yaml("reward_training", training)
    same = asked.exists() and asked.read_text(encoding="utf-8") == text
    if same and run.model.exists():
        return run.model
    if not run.holds_results():  # else the training says that another run is there
        run.path.mkdir(parents=True, exist_ok=True)
        asked.write_text(text, encoding="utf-8")
    return train_on_texts(training, trust_remote_code=trust_remote_code, resume=same).folder
