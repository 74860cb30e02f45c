"""How do rollout phases, optimiser steps and forward passes fit together, and how long may prompts be?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Counts per process. A phase samples `prompts * group` completions and serves `steps` optimiser steps."""

    prompts: int
    """Prompts of a rollout phase."""
    group: int
    """Completions of a prompt."""
    micro: int
    """Completions of a forward pass."""
    accumulation: int
    """Forward passes of an optimiser step."""
    passes: int
    """Passes over each phase."""

    @property
    def completions(self) -> int:
        """Completions of a phase."""
        return self.prompts * self.group

    @property
    def step(self) -> int:
        """Completions of an optimiser step."""
        return self.micro * self.accumulation

    @property
    def steps(self) -> int:
        """Optimiser steps of a phase."""
        return self.passes * self.completions // self.step

    @property
    def on_policy(self) -> bool:
        """Whether each phase serves a single update, so that the ratio is 1."""
        return self.steps == 1

    def phases(self, rows: int, world: int) -> int:
        """Phases of a pass over `rows` prompts by `world` processes; the last one runs on into the next pass."""
        return math.ceil(rows / (self.prompts * world))


def make_plan(config: Any, group_relative: bool) -> Plan:
    """The plan of a run, whose algorithm compares completions of one prompt or not. (What does not fit is refused with the config.)"""
    train = config.train
    group = train.num_generations if group_relative else 1
    micro, accumulation = train.per_device_batch_size, train.gradient_accumulation_steps
    step = micro * accumulation
    if train.is_set("rollout_batch_size"):
        prompts = train.rollout_batch_size
    else:
        prompts = step // group
    return Plan(prompts, group, micro, accumulation, train.num_ppo_epochs)


def prompt_budget(config: Any) -> int:
    """Longest prompt of an online run, in tokens."""
    room = config.model.max_seq_length - config.train.max_completion_length
    return min(config.train.max_prompt_length, room)
