"""Which words name the big choices: algorithm, backend, precision, task."""

from __future__ import annotations

from aligntune.config.base import Choice


class AlgorithmType(Choice):
    """What is trained and by which loss."""

    SFT = "sft"
    PPO = "ppo"
    DPO = "dpo"
    GRPO = "grpo"
    DAPO = "dapo"
    DR_GRPO = "dr_grpo"
    GSPO = "gspo"
    NEURAL_MIRROR_GRPO = "neural_mirror_grpo"
    META_ES = "meta_es"

    @classmethod
    def also(cls) -> dict[str, str]:
        return {"drgrpo": "dr_grpo", "nmgrpo": "neural_mirror_grpo", "neuralmirrorgrpo": "neural_mirror_grpo",
                "neuralmirror": "neural_mirror_grpo", "metaes": "meta_es"}  # fmt: skip


class BackendType(Choice):
    """Who loads the model and runs the training loop."""

    AUTO = "auto"
    TRL = "trl"
    UNSLOTH = "unsloth"
    NATIVE = "native"


class PrecisionType(Choice):
    """Number format of the computation."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    AUTO = "auto"

    @classmethod
    def also(cls) -> dict[str, str]:
        return {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


class TaskType(Choice):
    """What supervised fine-tuning teaches."""

    INSTRUCTION_FOLLOWING = "instruction_following"
    SUPERVISED_FINE_TUNING = "supervised_fine_tuning"
    TEXT_CLASSIFICATION = "text_classification"
    TOKEN_CLASSIFICATION = "token_classification"
    TEXT_GENERATION = "text_generation"
    CHAT_COMPLETION = "chat_completion"

    @property
    def is_classification(self) -> bool:
        return self in (TaskType.TEXT_CLASSIFICATION, TaskType.TOKEN_CLASSIFICATION)


LOGGERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Trackers that a run can be logged to."""
