"""What is seen of compiled layers without compiling them."""

from __future__ import annotations

from typing import Any

from aligntune.models.forward import causal_model
from aligntune.models.kernels.compile import decoder_layers


def kept(session: Any) -> str | None:
    """What the layers of a session's trainer keep for their backward pass; None: they are not compiled."""
    session.build_trainer()
    forward = vars(decoder_layers(causal_model(session.model))[0]).get("forward")
    return None if forward is None else forward.__func__.args[0]
