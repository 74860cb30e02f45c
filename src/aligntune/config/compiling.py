"""Are the decoder layers of a run compiled, and what do they keep, as far as its settings tell?

`trainers.compiling` adds what model and machine say, `planning` what the model's shape says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from aligntune.config.applies import ONLINE
from aligntune.config.enums import AlgorithmType
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import ConfigError

Keep = Literal["all", "cheap", "half", "mlp"]
"""What a compiled layer recomputes in its backward pass, in place of keeping it.

all: keeps whatever the compiler likes, for speed. cheap: recomputes norms, activations and rotations, and keeps the results
of matrix products and attention. half: of the two wide products that enter a gated MLP, one is recomputed too. mlp: both
are. A product is wide when its result is more than twice as wide as its input.
"""
EARNS = 250
"""Forward and backward passes from which an unasked compilation pays. Compiling took 14 to 16 seconds on an H100's host, 4 on an
H200's. A pass by a 0.5B model then takes 0.07 seconds less for 16k tokens of SFT, 0.04 for 11k of GRPO at lengths that vary; larger
models gain more."""
ELSEWHERE = "this architecture keeps its layers elsewhere"


@dataclass(frozen=True)
class Compiling:
    """A run that is to be compiled. `asked`: the setting that asks for it, if one does; `problem`: why it cannot be."""

    keep: Keep
    asked: str | None
    problem: str | None = None

    def unless(self, problem: str | None) -> Compiling:
        """With a further reason against it. Raises ConfigError where compiling was asked for and cannot be."""
        first = self.problem or problem
        if first is not None and self.asked is not None:
            raise ConfigError(f"{self.asked}: {first}")
        return replace(self, problem=first)

    def unless_it_drops(self, place: str | None) -> Compiling:
        """With the reason that layers which recompute have dropout at `place` (None: they have none)."""
        if place is None or self.keep == "all":
            return self
        return self.unless(
            f"selective_checkpointing would draw other dropout in its second pass: set the dropout of {place} to 0"
        )


def compiling(run: SFTRunConfig | RLRunConfig, steps: Callable[[], int | None]) -> Compiling | None:
    """None where nobody wants it. `steps`: optimiser steps of the run, called if they matter; unknown ones count as many."""
    settings = run.model
    asked = None
    if settings.compile or settings.selective_checkpointing != "off":
        asked = "model.compile" if settings.compile else "model.selective_checkpointing"
    if settings.compile is False or (asked is None and not _measured(run)):
        return None
    kept: tuple[Keep, ...] = get_args(Keep)
    keep: Keep = next((each for each in kept if each == settings.selective_checkpointing), "all")
    found = Compiling(keep, asked).unless(_problem(run))
    return found if asked or found.problem else found.unless(_too_short(run, steps()))


def _measured(run: SFTRunConfig | RLRunConfig) -> bool:
    """Whether steps of this kind were measured to gain by it. Online algorithms with LoRA, whose reference is a third variant to
    compile, were not; nor was DPO on a host with nothing else to do."""
    if run.algorithm == AlgorithmType.SFT:
        return True
    return run.algorithm in ONLINE - {AlgorithmType.META_ES} and run.model.lora is None


def _problem(run: SFTRunConfig | RLRunConfig) -> str | None:
    if run.launch.strategy == "zero3":
        return "DeepSpeed gathers the weights of a layer by hooks, which the compiler would trace"
    if getattr(run.train, "activation_offloading", False):
        return "activations are offloaded, and the compiler would trace what moves them"
    return "quantised layers do not compile" if run.model.quantization else None


def _too_short(run: SFTRunConfig | RLRunConfig, steps: int | None) -> str | None:
    passes = EARNS if steps is None else steps * run.train.gradient_accumulation_steps
    if passes >= EARNS:
        return None
    return f"{passes} passes do not earn the time it takes ({EARNS} do; model.compile: true compiles all the same)"
