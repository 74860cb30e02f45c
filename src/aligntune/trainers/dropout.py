"""Turning dropout off, so that the log-probabilities of two passes compare."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Every dropout of the model to 0, those inside attention (a number on the module) included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
