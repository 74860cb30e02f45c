"""What does a causal language model say about these rows, at the cost of the tokens that matter?

One padding-free pass through the decoder trunk, then the language-model head on the trained positions only, chunk by
chunk (`kernels.linear_loss`): neither pad tokens nor a `[T, V]` tensor exist. Serves full models and PEFT models whose
adapters lie in the trunk, in training and evaluation, with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aligntune.errors import ModelError
from aligntune.models.kernels.attention import PACKED_SDPA, VARLEN
from aligntune.models.kernels.linear_loss import LogProbs, head_logits, linear_cross_entropy, linear_log_probs
from aligntune.models.modes import evaluating
from aligntune.models.packed import PackedRows
from aligntune.models.positions import check_positions
from aligntune.models.wrapped import run_as_forward

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Transformers' own implementations that take document boundaries as arguments, as ours do; the others read the
boundaries off the position ids and build a dense mask."""

TOLERANCE = 0.05
"""Nats by which a model may differ from its own plain forward pass when it is tried: wide enough for bfloat16."""

PADDED = "aligntune_padded"
"""Attribute of a model that is not run packed."""


@dataclass(frozen=True)
class Head:
    """The language-model head as a linear map: `logits = scale * (hidden @ weight.T + bias)`, soft-capped if asked."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` float32 logits of a few hidden states `[N, H]`."""
        logits = head_logits(hidden, self.weight, self.bias).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def arguments(self, temperature: float = 1.0) -> dict[str, Any]:
        """`softcap` and `temperature` for the kernels, with the scale folded into both."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"bias": self.bias, "softcap": softcap, "temperature": temperature / self.scale}


def packed_log_probs(
    model: nn.Module,
    rows: PackedRows,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_grad: bool = False,
    collision: bool = False,
    chunk_tokens: int | None = None,
) -> LogProbs:
    """Log-probabilities `[M]` of the trained tokens of `rows`; `rows.padded` lays them out as `[B, L]`."""
    wanted: dict[str, Any] = {
        "entropy": entropy,
        "entropy_grad": entropy_grad,
        "collision": collision,
        "chunk_tokens": chunk_tokens,
    }

    def from_head(hidden: Tensor) -> LogProbs:
        head = model_head(model)
        return linear_log_probs(hidden, head.weight, rows.targets, **head.arguments(temperature), **wanted)

    return LogProbs(*_through_model(model, rows, from_head))


def packed_loss(
    model: nn.Module,
    rows: PackedRows,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["sum", "mean", "none"] = "mean",
) -> Tensor:
    """Cross-entropy of the trained tokens of `rows`: a scalar, or `[M]` for "none"."""
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}

    def from_head(hidden: Tensor) -> Tensor:
        head = model_head(model)
        return linear_cross_entropy(hidden, head.weight, rows.targets, **head.arguments(), **options)

    return _through_model(model, rows, from_head)


def _through_model(model: nn.Module, rows: PackedRows, from_head: Callable[[Tensor], Any]) -> Any:
    """`from_head` of the hidden states that predict trained tokens, as one call of the model and one of its head.

    The calls keep parallel wrappers in step: gradients are reduced, and sharded weights are whole where they are read.
    """
    layer = causal_model(model).get_output_embeddings()

    def compute(_: Tensor) -> Any:
        hidden = trunk_hidden(model, rows)[rows.predictors]
        return from_head(hidden) if layer is None else run_as_forward(layer, from_head, hidden)

    return run_as_forward(model, compute, rows.input_ids)


def trunk_hidden(model: nn.Module, rows: PackedRows) -> Tensor:
    """Last hidden states `[T, H]` of all tokens, after the final norm."""
    causal = causal_model(model)
    check_positions(causal, rows.max_length)
    if PADDED in vars(causal):
        return _padded_hidden(causal, rows)
    extra: dict[str, Any] = {}
    implementation = causal.config._attn_implementation
    if implementation in (*FLASH, VARLEN, PACKED_SDPA):
        extra = {"cu_seq_lens_q": rows.cu_seqlens, "cu_seq_lens_k": rows.cu_seqlens}
        extra |= {"max_length_q": rows.max_length, "max_length_k": rows.max_length}
    if implementation in (VARLEN, PACKED_SDPA):
        # A mask of four dimensions passes through transformers as it is. Ours ignore it, and nobody looks for packed
        # documents in the position ids, which would wait for the device.
        extra["attention_mask"] = rows.no_mask
    out = decoder(causal)(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **extra)
    return out.last_hidden_state[0]


def use_padding(model: nn.Module) -> None:
    """From now on, run this model on padded rows: for models that `check_packed` refuses, or to compare with others."""
    setattr(causal_model(model), PADDED, True)


def runs_padded(model: nn.Module) -> bool:
    """Whether `use_padding` was said of this model."""
    return PADDED in vars(causal_model(model))


def _padded_hidden(causal: Any, rows: PackedRows) -> Tensor:
    """As `trunk_hidden`, by a plain batch `[B, L]` padded on the right."""
    lengths = rows.cu_seqlens.diff()
    ids = nn.utils.rnn.pad_sequence(list(rows.input_ids[0].split(lengths.tolist())), batch_first=True)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    out = decoder(causal)(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    return out.last_hidden_state[mask]


def causal_model(model: nn.Module) -> Any:
    """The transformers model inside PEFT or parallel wrappers, adapters live. ModelError for what cannot be packed."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "get_decoder"):
        inner = inner.module
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        if inner.active_peft_config.is_prompt_learning:
            raise ModelError(
                "prompt tuning puts virtual tokens in front of every row and cannot be trained here: use LoRA"
            )
        inner = inner.get_base_model()
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ModelError(f"{type(inner).__name__} is an encoder-decoder model: only decoder-only models can be trained")
    return inner


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its tokens."""
    weight: Tensor = causal_model(model).get_input_embeddings().weight
    return weight.device


def decoder(causal: Any) -> Any:
    """The model below the head. Where transformers looks for it in vain, `get_decoder` gives the whole model back."""
    found = causal.get_decoder()
    return found if found is not causal else causal.model


def model_head(model: nn.Module) -> Head:
    """The output embedding of the model with its config's soft-capping and scaling."""
    causal = causal_model(model)
    layer = causal.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(causal).__name__} has no language-model head")
    if hasattr(layer, "lora_A") or hasattr(layer, "base_layer"):
        raise ModelError("an adapter on the language-model head is not supported: leave lm_head out of target_modules")
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies, Granite divides
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    return Head(layer.weight, getattr(layer, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


@torch.no_grad()
def check_packed(model: nn.Module) -> str | None:
    """Why this model cannot be run packed, or None: it is tried on two short rows against its own plain forward pass.

    Finds models whose head does more than `Head` says, whose positions cannot be given, or whose layers leak state
    from one row into the next.
    """
    causal = causal_model(model)
    device = input_device(model)
    vocab, name = causal.get_input_embeddings().weight.shape[0], type(causal).__name__
    if any(x.dim() == 4 and x.shape[-1] == x.shape[-2] > 1 for x in causal.buffers()):
        return f"{name} keeps masks of a fixed size, which packed rows outgrow"
    rows = [[i % vocab for i in range(3, 10)], [i % vocab for i in range(5, 9)]]
    packed = PackedRows.build(rows, [[True] * len(row) for row in rows], device)
    try:
        with evaluating(model):
            got = packed_log_probs(model, packed).log_probs
            want = torch.cat([_plain_log_probs(causal, torch.tensor([row], device=device)) for row in rows])
    except (TypeError, ValueError) as error:
        return f"{name} does not take packed rows: {error}"
    worst = (got - want).abs().max().item()
    if worst <= TOLERANCE:
        return None
    return f"{name} gives other log-probabilities when rows are packed (by {worst:.3g} nats)"


def _plain_log_probs(causal: Any, ids: Tensor) -> Tensor:
    logits = causal(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
