"""Are the decoder layers of a run compiled, and what do they keep?"""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

from torch import nn

from aligntune.config.compiling import ELSEWHERE, compiling
from aligntune.models.forward import causal_model, runs_padded
from aligntune.models.kernels.compile import compile_layers, decoder_layers, restore_layers
from aligntune.models.precision import device

logger = logging.getLogger(__name__)


def compile_model(session: Any) -> None:
    """Compile the layers of the session's model if its settings, or their defaults, say so.

    Raises ConfigError when that was asked for and cannot be.
    """
    found, model = compiling(session.config, session.optimizer_steps), session.model
    if found is None:
        return
    if found.asked is None and device().type != "cuda":
        found = found.unless("there is no CUDA GPU")
    found = found.unless(_problem(model)).unless_it_drops(_dropout(model))
    if found.problem is not None:
        logger.info("decoder layers are not compiled: %s", found.problem)
        return
    restore_layers(causal_model(model))
    number = compile_layers(causal_model(model), keep=found.keep)
    logger.info("%d decoder layers are compiled: the first steps take a quarter of a minute or more", number)


def _problem(model: nn.Module) -> str | None:
    """Why the layers of this model cannot be compiled here, or None."""
    if runs_padded(model):
        return "this model runs on padded rows"
    if not decoder_layers(causal_model(model)):
        return ELSEWHERE
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
