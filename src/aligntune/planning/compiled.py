"""Will the decoder layers of a run be compiled on a GPU, and what will they keep? As `trainers.compiling` decides it."""

from __future__ import annotations

from typing import get_args

from aligntune.config.enums import AlgorithmType
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import ConfigError
from aligntune.planning.memory import Keep
from aligntune.planning.shapes import FAMILIES, Shape

MEASURED = (AlgorithmType.SFT,)
"""Algorithms whose layers are compiled without being asked (`trainers.compiling.MEASURED`)."""


def what_compiled_layers_keep(run: SFTRunConfig | RLRunConfig, shape: Shape) -> Keep | None:
    """For a run of the native backend's language-model trainers; None: layers are not compiled.

    Raises ConfigError when compiling was asked for and the run will refuse it.
    """
    settings = run.model
    wanted = settings.selective_checkpointing
    asked = settings.compile or wanted != "off"
    if settings.compile is False or not (asked or run.algorithm in MEASURED):
        return None
    problem = _problem(run, shape)
    if problem is None and wanted != "off" and settings.lora is not None and settings.lora.dropout:
        problem = "selective_checkpointing would draw other dropout in its second pass: set the dropout of LoRA (lora_dropout) to 0"  # fmt: skip
    if problem is None:
        return next((keep for keep in get_args(Keep) if keep == wanted), "all")
    if asked:
        raise ConfigError(f"model.{'compile' if settings.compile else 'selective_checkpointing'}: {problem}")
    return None


def _problem(run: SFTRunConfig | RLRunConfig, shape: Shape) -> str | None:
    if run.launch.strategy in ("fsdp2", "zero3"):
        return "weights are sharded, which compiled layers were not tried with"
    if getattr(run.train, "activation_offloading", False):
        return "activations are offloaded, and the compiler would trace what moves them"
    if run.model.quantization:
        return "quantised layers do not compile"
    if shape.family is FAMILIES["gpt2"]:
        return "this architecture keeps its layers elsewhere"
    return None
