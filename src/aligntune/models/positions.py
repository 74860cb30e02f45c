"""How long may a row be for the positions of a model, and what does a longer one do to its neighbours?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from aligntune.errors import ModelError

logger = logging.getLogger(__name__)

LIMITS = "aligntune_limits"
"""Attribute of a model: its `Limits`."""


@dataclass
class Limits:
    table: int | None
    """Places in the table where the model looks positions up, as GPT-2 does; None: it computes them."""
    switch: int | None
    """Tokens beyond which the longest row of a batch changes the rotary frequencies of all (dynamic scaling, LongRoPE)."""


def encoder_positions(config: Any) -> int | None:
    """Tokens that the table of positions in an encoder's config is for; None: it has none."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions and getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        positions -= (config.pad_token_id or 0) + 1  # their positions begin after the padding id
    return positions or None


def check_positions(causal: Any, tokens: int) -> None:
    """Before a pass whose longest row has so many tokens. ModelError if that is more than the model has positions for; a warning,
    once, if rows that are read together change each other's numbers."""
    if LIMITS not in vars(causal):
        setattr(causal, LIMITS, Limits(_table(causal), _switch(causal.config.get_text_config())))
    limits = vars(causal)[LIMITS]
    name = type(causal).__name__
    if limits.table is not None and tokens > limits.table:
        raise ModelError(
            f"a row of {tokens} tokens is too long: {name} has positions for {limits.table}. Set the limits on prompts, answers and "
            "whole rows (max_seq_length and the like) so that they fit"
        )
    if limits.switch is not None and tokens > limits.switch:
        logger.warning(
            "%s takes its rotary frequencies from the longest row of a batch: beside a row of more than %d tokens the shorter ones get "
            "other numbers than alone. Keep all rows within that (max_seq_length and the like)", name, limits.switch,
        )  # fmt: skip
        limits.switch = None


def _table(causal: Any) -> int | None:
    most = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    vocab = causal.get_input_embeddings().weight.shape[0]
    learned = {module.num_embeddings for module in causal.modules() if isinstance(module, nn.Embedding)} - {vocab}
    fixed = {len(buffer) for name, buffer in causal.named_buffers() if name.endswith("embed_positions")}
    return most if any(most <= places <= most + 2 for places in learned | fixed) else None  # OPT's begin at 2


def _switch(text: Any) -> int | None:
    """`rope_parameters` are those of the model, or one mapping for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):
        if isinstance(each, Mapping) and each.get("rope_type") in ("dynamic", "longrope"):
            original = each.get("original_max_position_embeddings")
            return int(original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings))
    return None
