"""How do packed documents attend within themselves, without a `[T, T]` mask?

Two roads over the same boundaries: torch's variable-length flash kernel (CUDA, half precision), and plain
scaled-dot-product attention on documents put into buckets of like length (anywhere, any precision). In a bucket the
documents are padded on the right, where causal attention cannot see the padding, so no mask is needed.

Shapes: B rows, T tokens a row, Hq query heads, Hk key-value heads, D head size, N = B * T.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from aligntune.models.precision import HALF

T = TypeVar("T")
VARLEN_TAKES_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch >= 2.12


@dataclass
class Documents:
    """Where each document lies in the N flattened tokens. `cu_seqlens` `[docs + 1]` int32; `whole_rows`: every row is
    one document, so that ordinary batched attention does."""

    cu_seqlens: Tensor
    max_length: int
    whole_rows: bool = False

    def buckets(self) -> list[Bucket]:
        """Documents by length: within a bucket the longest has less than twice the tokens of the shortest."""
        return _once("buckets", self.cu_seqlens, lambda: _make_buckets(self.cu_seqlens))


@dataclass(frozen=True)
class Bucket:
    """`source` `[docs, L]`: token places, clamped where a document is shorter than L; `valid` `[docs, L]` says where it
    is not; `target` `[valid tokens]`: the places of those that are."""

    source: Tensor
    valid: Tensor
    target: Tensor


_LAST: dict[str, tuple[weakref.ref[Tensor], int, Any]] = {}
"""What was made last -> the tensor it was made from, that tensor's version, and the result."""


def _once(what: str, source: Tensor, make: Callable[[], T]) -> T:
    """`make()`, once for all layers of a forward pass and its recomputation, which get the same tensor `source`."""
    if torch.compiler.is_compiling() or source.is_inference():
        return make()
    known = _LAST.get(what)
    if known is None or known[0]() is not source or known[1] != source._version:
        known = _LAST[what] = weakref.ref(source), source._version, make()
    return cast(T, known[2])


def _make_buckets(cu_seqlens: Tensor) -> list[Bucket]:
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = int(cu_seqlens[-1])
    size = torch.ceil(torch.log2(lengths.double()))
    buckets = []
    for exponent in size.unique().tolist():
        inside = size == exponent
        begin, length = starts[inside], lengths[inside]
        places = begin[:, None] + torch.arange(int(length.max()), device=begin.device)
        valid = places < (begin + length)[:, None]
        buckets.append(Bucket(places.clamp(max=total - 1), valid, places[valid]))
    return buckets


def documents_of(position_ids: Tensor | None, batch: int, length: int, device: torch.device) -> Documents:
    """Boundaries from positions: a document begins wherever the position does not follow the one before, as in
    transformers. It waits for the device, so callers who know the boundaries pass them instead."""
    if position_ids is None or position_ids.shape[-1] != length:
        return _rows(batch, length, device)
    return _once("documents", position_ids, lambda: _find_documents(position_ids, batch, length))


def _rows(batch: int, length: int, device: torch.device) -> Documents:
    return Documents(torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device), length, True)


def _find_documents(position_ids: Tensor, batch: int, length: int) -> Documents:
    begins = torch.ones(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    starts = begins.expand(batch, -1).flatten().nonzero().flatten()
    if len(starts) == batch:
        return _rows(batch, length, position_ids.device)
    cu_seqlens = torch.cat([starts, starts.new_tensor([batch * length])]).to(torch.int32)
    return Documents(cu_seqlens, int(cu_seqlens.diff().max()))


def bucketed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    scale: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within documents by `scaled_dot_product_attention`; `[N, H, D]` in, `[N, Hq, D]` out.

    `window`: a token sees itself and the `window - 1` tokens before it."""
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    for bucket in documents.buckets():
        q, k, v = (x[bucket.source].transpose(1, 2) for x in (query, key, value))
        y = _causal(q, k, v, scale, window, dropout).transpose(1, 2)
        out = out.index_copy(0, bucket.target, y[bucket.valid])
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, dropout: float) -> Tensor:
    length = q.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=gqa)
    band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=band, dropout_p=dropout, scale=scale, enable_gqa=gqa)


def varlen_runs(query: Tensor, value: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether torch's flash kernel knows these head sizes, in `dtype` on this device."""
    size = query.shape[-1]
    return query.is_cuda and dtype in HALF and size <= 256 and size % 8 == 0 and value.shape[-1] == size


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, scale: float | None, window: int | None
) -> Tensor:
    """The same by torch's flash kernel: `[N, H, D]` bfloat16 or float16 on CUDA."""
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and VARLEN_TAKES_GQA:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    cu, longest = documents.cu_seqlens, documents.max_length
    return cast(Tensor, varlen_attn(query, key, value, cu, cu, longest, longest, **options))
