"""Which reward model does a run use? By folder, by hub name, or by its full source."""

from __future__ import annotations

from typing import Any

from aligntune.errors import ConfigError
from aligntune.rewards.model import RewardModel, load


def reward_model_of(config: Any) -> RewardModel | None:
    """The reward model that an online run names, loaded on `reward_device`; None when it names none."""
    model = config.model
    source = model.reward_model_source
    if config.reward_training is not None or (source is not None and source.training_config is not None):
        raise ConfigError(
            "training a reward model inside a run is not implemented yet (reward_training, reward_model_source.training_config): "
            "train it before and name its folder with reward_path"
        )
    name = model.reward_path or model.reward_model_name
    if source is not None:
        name = source.model_path or source.model_name
    if name is None:
        return None
    return load(
        name,
        device=model.reward_device,
        quantization=model.reward_model_quantization or None,
        trust_remote_code=model.trust_remote_code,
    )
