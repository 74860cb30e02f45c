"""Are the decoder layers of a run compiled, as far as its settings tell?

`trainers.compiling` adds what model and machine say, `planning` what the model's shape says.
"""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.config.enums import AlgorithmType
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import ConfigError

MEASURED = (AlgorithmType.SFT,)
"""Algorithms whose steps were measured to gain by it: compiled without being asked."""
EARNS = 500
"""Forward and backward passes from which an unasked compilation pays. Compiling took 25 to 100 seconds on an H100's host,
and a pass of 16k tokens by a 0.5B model then takes 0.07 seconds less; larger models gain more."""


@dataclass(frozen=True)
class Compiling:
    """A run that is to be compiled. `asked`: the setting that asks for it, if one does; `problem`: why it cannot be."""

    asked: str | None
    problem: str | None = None

    def unless(self, problem: str | None) -> Compiling:
        """With a further reason against it. Raises ConfigError where compiling was asked for and cannot be."""
        first = self.problem or problem
        if first is not None and self.asked is not None:
            raise ConfigError(f"{self.asked}: {first}")
        return Compiling(self.asked, first)


def compiling(run: SFTRunConfig | RLRunConfig, steps: int | None) -> Compiling | None:
    """None where nobody wants it. `steps`: optimiser steps of the run; None, if unknown, counts as many."""
    settings = run.model
    asked = None
    if settings.compile or settings.selective_checkpointing != "off":
        asked = "model.compile" if settings.compile else "model.selective_checkpointing"
    if settings.compile is False or (asked is None and run.algorithm not in MEASURED):
        return None
    return Compiling(asked).unless(_problem(run)).unless(None if asked else _too_short(run, steps))


def _problem(run: SFTRunConfig | RLRunConfig) -> str | None:
    if run.launch.strategy in ("fsdp2", "zero3"):
        return "weights are sharded, which compiled layers were not tried with"
    if getattr(run.train, "activation_offloading", False):
        return "activations are offloaded, and the compiler would trace what moves them"
    return "quantised layers do not compile" if run.model.quantization else None


def _too_short(run: SFTRunConfig | RLRunConfig, steps: int | None) -> str | None:
    passes = EARNS if steps is None else steps * run.train.gradient_accumulation_steps
    if passes >= EARNS:
        return None
    return f"{passes} passes do not earn the time it takes ({EARNS} do; model.compile: true compiles all the same)"
