"""How is dropout turned off, so that the log-probabilities of two passes compare?"""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Every dropout of the model to 0, the rates that modules keep as numbers of their own included (inside attention, in
    the layers of OPT, BLOOM and XGLM)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
