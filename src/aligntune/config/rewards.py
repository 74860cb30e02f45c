"""What can be set for rewards and reward models?"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from aligntune.config.base import Count, Function, Named, OneOf, Rate, Section, Settings, Text, Weight


class RewardConfig(Section):
    """One reward function. Order of effect: raw score, `shield`, `normalize`, `clip`, `weight`."""

    type: Function | str
    """Name of a built-in reward (`aligntune reward list`), a callable, `module:function`, or `file.py:function`."""
    weight: Weight = 1.0
    """Factor of this reward in the sum."""
    params: Settings = {}
    """Keyword arguments of the reward function."""
    shield: bool = False
    """A completion that the safety scorer flags cannot score above 0."""
    clip: Rate | None = None
    """Limit to [-clip, clip], after normalisation."""
    normalize: bool = False
    """Subtract the running mean of this reward and divide by its running standard deviation."""
    on_error: Annotated[str, OneOf("raise", "null")] = "raise"
    """When the function raises: `raise` stops the run and shows the sample; `null` counts it and leaves that score out.
    (Addition.)"""


class RewardModelTrainingConfig(Section):
    """Training of a reward model on texts labelled by reward functions."""

    base_model_name: Named
    """Model that gets the regression head."""
    training_texts: Annotated[list[str], Field(min_length=10)]
    """Texts to score and learn from; at least 10."""
    reward_functions: Annotated[list[Function | str], Field(min_length=1)]
    """Reward functions whose weighted sum is the label."""
    output_dir: Named
    """Folder for the reward model."""
    reference_texts: list[str] | None = None
    """One reference per text, for rewards that compare with one."""
    reward_weights: list[Weight] | None = None
    """One weight per reward function. Unset: 1 each."""
    num_epochs: Count = 3
    """Passes over the texts."""
    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    batch_size: Count = 8
    """Texts per forward pass."""
    gradient_accumulation_steps: Count = 4
    """Forward passes per optimiser step."""
    micro_batch_tokens: Count | None = None
    """Most tokens of one forward and backward pass, padding included: a batch that holds more is cut into passes, with the same
    optimiser step. (Addition.)"""
    max_length: Count = 512
    """Longest text in tokens; longer ones lose their beginning."""
    eval_interval: Count | None = None
    """Optimiser steps between two evaluations on the texts held out, each with a checkpoint. Unset: an epoch. (Addition.)"""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_functions):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} entries for {len(self.reward_functions)} reward_functions"
            )
        if self.reference_texts is not None and len(self.reference_texts) != len(self.training_texts):
            raise ValueError(
                f"reference_texts has {len(self.reference_texts)} entries for {len(self.training_texts)} training_texts"
            )
        return self


class RewardModelSourceConfig(Section):
    """Where the reward model comes from."""

    source_type: Annotated[str, OneOf("pretrained_hf", "pretrained_local", "custom_trained")]
    """`pretrained_hf` needs `model_name`, `pretrained_local` needs `model_path`, `custom_trained` needs `training_config`."""
    model_name: str | None = None
    """Hub name of a sequence-classification model with one output."""
    model_path: Text | None = None
    """Folder of such a model."""
    training_config: RewardModelTrainingConfig | None = None
    """How to train one, or how to fine-tune the pretrained one."""
    fine_tune_with_rewards: bool = False
    """First fine-tune the pretrained model on texts labelled by reward functions (`training_config`)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        needs = {"pretrained_hf": "model_name", "pretrained_local": "model_path", "custom_trained": "training_config"}
        needed = needs[self.source_type]
        if getattr(self, needed) is None:
            raise ValueError(f"source_type {self.source_type} needs {needed}")
        allowed = {needed, "training_config"} if self.fine_tune_with_rewards else {needed}
        extra = sorted(name for name in needs.values() if name not in allowed and getattr(self, name) is not None)
        if extra:
            raise ValueError(f"source_type {self.source_type} takes {needed}, not {' and '.join(extra)}")
        if self.fine_tune_with_rewards and self.source_type == "custom_trained":
            raise ValueError(
                "fine_tune_with_rewards is for pretrained reward models; custom_trained already trains one"
            )
        if self.fine_tune_with_rewards and self.training_config is None:
            raise ValueError("fine_tune_with_rewards needs training_config (the texts and the reward functions)")
        return self
