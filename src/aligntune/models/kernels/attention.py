"""Which attention implementation runs, and how do ours plug into transformers?

Two implementations are registered with transformers' attention interface: `aligntune_varlen` (torch's variable-length
flash kernel) and `aligntune_packed_sdpa` (plain torch, any device). Both serve packed rows, padded batches, training and
evaluation, and never build a mask for packed rows; decoding with a KV cache goes to transformers' sdpa.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aligntune.errors import ModelError
from aligntune.models.kernels.documents import (
    Documents,
    bucketed_attention,
    documents_of,
    varlen_attention,
    varlen_runs,
)
from aligntune.models.precision import HALF

VARLEN, PACKED_SDPA = "aligntune_varlen", "aligntune_packed_sdpa"


def resolve_attention(
    name: str, device: torch.device | str, config: Any = None, model_class: Any = None
) -> tuple[str, str]:
    """(what to give transformers as `attn_implementation`, why).

    `auto` takes flash-attention if its package is installed, else torch's varlen kernel (CUDA, sm80 or newer), else
    packed sdpa. `config` is the model's, `model_class` what will be built from it: what they cannot run leads to
    transformers' own implementations, or, when it was asked for by name, to ModelError.
    """
    register_attention()
    device = torch.device(device)
    lacks = unsupported_attention(config)
    if name != "auto":
        if not _class_runs(model_class, name):
            raise ModelError(f"attn_implementation '{name}' cannot run {model_class.__name__}: use 'auto' or 'eager'")
        if name in (VARLEN, PACKED_SDPA) and lacks:
            raise ModelError(f"attn_implementation '{name}' cannot run this model ({lacks}): use 'auto' or 'eager'")
        if name == VARLEN and (missing := _varlen_missing(device)):
            raise ModelError(f"attn_implementation '{name}' cannot run here ({missing}): use 'auto' or 'sdpa'")
        return name, "asked for"
    installed = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if installed and _class_runs(model_class, "flash_attention_2"):
        return "flash_attention_2", "the flash_attn package is installed"
    if not _class_runs(model_class, PACKED_SDPA):
        own = "sdpa" if _class_runs(model_class, "sdpa") else "eager"
        return own, f"{model_class.__name__} computes its attention itself"
    if lacks:
        return ("eager" if "soft-capping" in lacks or "sinks" in lacks else "sdpa"), f"the model has {lacks}"
    missing = _varlen_missing(device)
    if missing is None:
        return VARLEN, "flash_attn is not installed; torch's variable-length kernel does the same"
    return PACKED_SDPA, f"{missing}; plain torch, packed documents without a mask"


def _class_runs(model_class: Any, name: str) -> bool:
    """Whether transformers' class can be built with the implementation `name`; yes where the class is not known."""
    if model_class is None or name == "eager":
        return True
    if name == "flex_attention":
        return bool(model_class._supports_flex_attn)
    if name.startswith("flash_attention"):
        return bool(model_class._supports_flash_attn)
    ours = name in (VARLEN, PACKED_SDPA)
    return bool(model_class._supports_sdpa and (not ours or model_class._supports_attention_backend))


def _varlen_missing(device: torch.device) -> str | None:
    """Why torch's kernel cannot run on this device, or None."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "torch's variable-length kernel needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere (sm80)"
    return None


def unsupported_attention(config: Any) -> str | None:
    """A feature of the model that our kernels do not compute, or None."""
    if config is None:
        return None
    text = config.get_text_config()
    features = {
        "attn_logit_softcapping": "soft-capping of attention scores",
        "attention_chunk_size": "chunked attention",
        "use_attention_sinks": "attention sinks",
    }
    for name, meaning in features.items():
        if getattr(text, name, None):
            return meaning
    if text.model_type == "gpt_oss":
        return "attention sinks"
    return "sliding windows that only its mask knows" if _windows_in_mask(text) else None


def _windows_in_mask(text: Any) -> bool:
    """Whether some layers look at a window that transformers hands over in the mask alone, and never as an argument."""
    window = getattr(text, "sliding_window", None)
    if text.model_type == "qwen2_moe":
        return window is not None and "sliding_attention" in text.layer_types
    inside = window is not None and window < text.max_position_embeddings
    return text.model_type in ("phimoe", "doge") and inside


def register_attention() -> None:
    """Make both implementations known to transformers; may be called again."""
    for name, core in ((VARLEN, _varlen_or_buckets), (PACKED_SDPA, _buckets)):
        AttentionInterface.register(name, _forward_with(core))
        AttentionMaskInterface.register(name, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> Tensor | None:
    """None for whole or packed rows; transformers' own boolean mask for padding and for decoding with a cache."""
    from_start = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    if from_start and attention_mask is None:
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, attention_mask=attention_mask, **rest
    )  # fmt: skip


Core = Callable[..., Tensor]


def _forward_with(core: Core) -> Callable[..., tuple[Tensor, None]]:
    """An attention function with transformers' signature: `[B, H, T, D]` in, `[B, T, Hq, D]` out."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
        scaling: float | None = None, sliding_window: int | None = None, position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, is_causal: bool | None = None, **rest: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        for name in ("softcap", "s_aux"):
            if rest.get(name) is not None:
                raise ModelError(
                    f"this model's attention uses {name}, which needs attn_implementation 'eager' or flash attention"
                )
        batch, _, length, _ = query.shape
        documents = None
        if cu_seq_lens_q is not None and max_length_q is not None:
            documents = Documents(cu_seq_lens_q, int(max_length_q))
        plain = key.shape[2] != length or not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        if documents is None and (plain or attention_mask is not None):
            rest |= {"is_causal": is_causal, "position_ids": position_ids}
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
            )
        if documents is None:
            documents = documents_of(position_ids, batch, length, query.device)
        whole = documents.whole_rows and (sliding_window is None or length <= sliding_window)
        if whole:
            rest |= {"is_causal": True}
            return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, **rest)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = core(module, q, k, v, documents, scaling, sliding_window, dropout)
        return out.unflatten(0, (batch, length)), None

    return forward


def _buckets(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    return bucketed_attention(q, k, v, documents, scale=scale, window=window, dropout=dropout)


def _varlen_or_buckets(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """The flash kernel where it can run: half precision (also what autocast or half-precision weights ask for), a head
    size it knows, no dropout."""
    dtype = _half_dtype(module, q)
    if dtype is None or dropout > 0 or not varlen_runs(q, v, dtype):
        return bucketed_attention(q, k, v, documents, scale=scale, window=window, dropout=dropout)
    return varlen_attention(q.to(dtype), k.to(dtype), v.to(dtype), documents, scale=scale, window=window)


def _half_dtype(module: nn.Module, query: Tensor) -> torch.dtype | None:
    """The half precision to attend in: norms kept in float32 hand over float32 queries of a half-precision model."""
    if query.dtype in HALF:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    weights = [p.dtype for p in module.parameters(recurse=True) if p.dim() == 2]
    return weights[0] if weights and weights[0] in HALF else None
