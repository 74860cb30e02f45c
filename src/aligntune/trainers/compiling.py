"""Are the decoder layers of a run compiled, and what do they keep?"""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

from torch import nn

from aligntune.config.enums import AlgorithmType
from aligntune.errors import ConfigError
from aligntune.models.forward import causal_model, runs_padded
from aligntune.models.kernels.compile import compile_layers, decoder_layers, restore_layers
from aligntune.models.precision import device

logger = logging.getLogger(__name__)

MEASURED = (AlgorithmType.SFT,)
"""Algorithms whose steps were measured to gain by it: compiled without being asked."""


def compile_model(session: Any) -> None:
    """Compile the layers of the session's model if its settings, or their defaults, say so.

    Raises ConfigError when that was asked for and cannot be.
    """
    settings, model = session.config.model, session.model
    keep = settings.selective_checkpointing
    asked = settings.compile or keep != "off"
    if settings.compile is False or not (asked or session.config.algorithm in MEASURED):
        return
    problem = _problem(session, model) or (None if asked or device().type == "cuda" else "there is no CUDA GPU")
    if problem is None and keep != "off" and (place := _dropout(model)):
        problem = (
            f"selective_checkpointing would draw other dropout in its second pass: set the dropout of {place} to 0"
        )
    if problem is None:
        restore_layers(causal_model(model))
        number = compile_layers(causal_model(model), keep="all" if keep == "off" else keep)
        logger.info("%d decoder layers are compiled: the first steps take some ten seconds longer", number)
    elif asked:
        raise ConfigError(f"model.{'compile' if settings.compile else 'selective_checkpointing'}: {problem}")
    else:
        logger.info("decoder layers are not compiled: %s", problem)


def _problem(session: Any, model: nn.Module) -> str | None:
    """Why the layers cannot be compiled, or None."""
    if session.config.launch.strategy in ("fsdp2", "zero3"):
        return "weights are sharded, which compiled layers were not tried with"
    if getattr(session.config.train, "activation_offloading", False):
        return "activations are offloaded, and the compiler would trace what moves them"
    if session.config.model.quantization:
        return "quantised layers do not compile"
    if runs_padded(model):
        return "this model runs on padded rows"
    if not decoder_layers(causal_model(model)):
        return "this architecture keeps its layers elsewhere"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")):
        return "compiling needs a C compiler (install gcc)"
    return None


def _dropout(model: nn.Module) -> str | None:
    """The name of a dropout that acts in the layers, or None."""
    for layer in decoder_layers(causal_model(model)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                return "LoRA (lora_dropout)" if "lora" in name else name
            if (
                isinstance(getattr(module, "attention_dropout", 0), float)
                and getattr(module, "attention_dropout", 0) > 0
            ):
                return "attention (attention_dropout)"
    return None
