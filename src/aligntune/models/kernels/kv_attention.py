"""How does a transformers model attend over a cache that is allocated once?

`aligntune_rollout` is an attention implementation for rollouts. It keeps the keys and values of every layer in one static
buffer and serves two kinds of calls: *prefill* (packed prompts in one row, whose keys and values are also copied to the
rows of all their completions) and *decode* (one token a row, each row at its own length). The model is called without
transformers' cache: plan and positions reach the layers as keyword arguments, so any model that passes its keyword
arguments on to the attention interface works.

Shapes: R rows of the buffer, b active rows, S buffer length, Hq and Hk heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from aligntune.errors import ModelError
from aligntune.models.kernels.documents import Documents, bucketed_attention, varlen_attention, varlen_runs

ROLLOUT = "aligntune_rollout"


class KVStore:
    """The static keys and values of every attention module that was prefilled: `[R, Hk, S, D]`, as attributes of the
    module while the store is attached."""

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def of(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a module, made on its first prefill from the shapes `[.., H, .., D]` of its keys and values."""
        if module not in self.layers:
            pair = [x.new_zeros(self.rows, x.shape[1], self.length, x.shape[3]) for x in (key, value)]
            self.layers[module] = (pair[0], pair[1])
        return self.layers[module]

    def attach(self) -> None:
        for module, (keys, values) in self.layers.items():
            module.aligntune_keys, module.aligntune_values = keys, values

    def detach(self) -> None:
        for module in self.layers:
            del module.aligntune_keys, module.aligntune_values

    def keep(self, rows: Tensor) -> None:
        """Move the buffers' rows `rows` to the front, in that order."""
        for pair in self.layers.values():
            for buffer in pair:
                buffer[: len(rows)] = buffer[rows]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self.layers.values() for x in pair)


@dataclass
class Prefill:
    """Packed prompts: their boundaries, and which token (`source` `[n]`) goes to which row and place of the buffers
    (`target_rows`, `target_places` `[n]`)."""

    store: KVStore
    documents: Documents
    source: Tensor
    target_rows: Tensor
    target_places: Tensor


def register_rollout_attention() -> None:
    """Make the implementation known to transformers; may be called again."""
    AttentionInterface.register(ROLLOUT, rollout_attention)
    AttentionMaskInterface.register(ROLLOUT, _no_mask)


def _no_mask(**_: Any) -> None:
    return None


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    kv_prefill: Prefill | None = None,
    kv_positions: Tensor | None = None,
    kv_mask: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: `[B, H, T, D]` in, `[B, T, Hq, D]` out. `kv_positions` `[b]`: tokens already in each row
    (where the new one goes); `kv_mask` `[b, 1, 1, length]`: what plain torch may see, new token included."""
    if rest.get("softcap") is not None or rest.get("s_aux") is not None:
        raise ModelError("attention with soft-capping or sinks is not supported by the 'graph' rollout engine")
    if kv_prefill is not None:
        return _prefill(module, query, key, value, kv_prefill, scaling, sliding_window), None
    if kv_positions is None:
        raise ModelError(f"attention '{ROLLOUT}' runs inside the 'graph' rollout engine only")
    keys, values = cast(Tensor, module.aligntune_keys), cast(Tensor, module.aligntune_values)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        from aligntune.models.kernels.decode_triton import decode_attention

        out = decode_attention(
            query[:, :, 0], key[:, :, 0], value[:, :, 0], keys, values, kv_positions, scale, sliding_window or 0
        )
        return out[:, None], None
    return _decode(query, key, value, keys, values, kv_positions, kv_mask, scale, sliding_window), None


def _prefill(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, plan: Prefill, scale: float | None, window: int | None
) -> Tensor:
    keys, values = plan.store.of(module, key, value)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    keys[plan.target_rows, :, plan.target_places] = k[plan.source]
    values[plan.target_rows, :, plan.target_places] = v[plan.source]
    attend = varlen_attention if varlen_runs(q, v, q.dtype) else bucketed_attention
    return attend(q, k, v, plan.documents, scale=scale, window=window)[None]


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """One token a row in plain torch; `mask` says how much of the buffers is looked at."""
    assert mask is not None, "the engine passes the mask wherever the Triton kernel cannot run"
    active, length = mask.shape[0], mask.shape[-1]
    rows = torch.arange(active)
    keys[rows, :, positions] = key[:, :, 0]
    values[rows, :, positions] = value[:, :, 0]
    if window is not None and length > window:
        mask = mask & (torch.arange(length) > positions[:, None, None, None] - window)
    heads = keys.shape[1]
    grouped = query.reshape(active, heads, query.shape[1] // heads, query.shape[-1])
    out = F.scaled_dot_product_attention(
        grouped, keys[:active, :, :length], values[:active, :, :length], attn_mask=mask, scale=scale
    )
    return out.reshape(active, 1, query.shape[1], values.shape[-1])
