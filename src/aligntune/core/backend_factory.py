"""`create_sft_trainer` and `create_rl_trainer` under the parameter reference's import path; they live in `aligntune.api`."""

from aligntune.api import create_rl_trainer, create_sft_trainer, create_trainer
from aligntune.config.enums import AlgorithmType, BackendType, PrecisionType, TaskType

__all__ = [
    "AlgorithmType",
    "BackendType",
    "PrecisionType",
    "TaskType",
    "create_rl_trainer",
    "create_sft_trainer",
    "create_trainer",
]
