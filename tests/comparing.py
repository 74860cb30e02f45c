"""In what do two runs, or two models, differ?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from aligntune.reporting.text import is_timing


def without_timing(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a metrics row that two runs of the same config on the same machine share."""
    return {name: value for name, value in row.items() if not is_timing(name)}


@torch.no_grad()
def largest_difference(one: Any, other: Any, input_ids: torch.Tensor) -> float:
    """Of two models' logits on `input_ids` [B, T]."""
    return float((one(input_ids).logits.float() - other(input_ids).logits.float()).abs().max())
