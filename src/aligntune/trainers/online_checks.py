"""Which settings of an online run cannot act on this machine? Refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch

from aligntune.errors import ConfigError, require


def check_online(run: Any) -> None:
    """ConfigError for a device that is not there."""
    model = run.model
    if model.reward_device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.reward_device: is cuda, and this machine has no CUDA device; use auto or cpu")
    if model.reward_model_quantization:
        require("bitsandbytes", extra="quant", why="model.reward_model_quantization")
