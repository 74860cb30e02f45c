"""AlignTune: one config and one command for supervised fine-tuning, reward models and RL alignment."""

from __future__ import annotations

from typing import Any

__all__ = ["create_rl_trainer", "create_sft_trainer", "create_trainer", "evaluate"]


def __getattr__(name: str) -> Any:
    """The functions of `aligntune.api`, imported when first asked for: every module of the package passes through here."""
    if name not in __all__:
        raise AttributeError(f"module 'aligntune' has no attribute {name!r}")
    from aligntune import api

    return getattr(api, name)
