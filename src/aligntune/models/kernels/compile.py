"""How are decoder layers compiled so that all of them, and all batch shapes, share one compilation?

A layer's forward pass is replaced, on the instance, by one compiled function that takes the layer as an argument: its
weights are inputs of the graph, so 24 layers compile once. Token counts are dynamic from the start. What lies between
layers (embedding, head, loss) stays as it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo.config
import torch.nn.attention.varlen
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from aligntune.config.compiling import Keep


def compile_layers(causal: Any, *, keep: Keep = "all") -> int:
    """Compile the decoder layers of a transformers model for training, in place; returns how many. Undone by
    `restore_layers`. The first step then takes a quarter of a minute or more on a GPU.

    `keep` other than "all" is selective activation checkpointing (Korthikanti et al. 2022, arXiv 2205.05198).
    """
    # A layer's floats (scaling, epsilon) are constants. Else the compiler takes them for inputs, finds out that they cannot be, and
    # starts over: twice the time.
    torch._dynamo.config.specialize_float = True
    # Under DDP the compiler would cut a layer at the bounds of gradient buckets, three pieces at 0.5B and more beyond, and keep what
    # passes between them for the backward pass. Layers are pieces already: buckets are reduced while the next layer's run.
    torch._dynamo.config.optimize_ddp = False
    return _replace(causal, partial(_training_step, keep))


def restore_layers(causal: Any) -> None:
    """Take compiled forward passes off again."""
    for layer in decoder_layers(causal):
        layer.__dict__.pop("forward", None)


@contextmanager
def decoding_layers(causal: Any, compiled: bool) -> Iterator[None]:
    """For the moment, layers as a decode step wants them: plain, or compiled apart from the trainer's compilations."""
    before = [layer.__dict__.pop("forward", None) for layer in decoder_layers(causal)]
    if compiled:
        _replace(causal, _decode_step)
    try:
        yield
    finally:
        restore_layers(causal)
        for layer, forward in zip(decoder_layers(causal), before, strict=True):
            if forward is not None:
                layer.forward = forward


def decoder_layers(causal: Any) -> list[nn.Module]:
    """The layers of the trunk; none where a model keeps them under another name."""
    return list(getattr(causal.get_decoder(), "layers", []))


def _replace(causal: Any, function: Callable[..., Any]) -> int:
    layers = decoder_layers(causal)
    for layer in layers:
        layer.forward = types.MethodType(function, layer)
    return len(layers)


def _training_step(keep: Keep, layer: nn.Module, hidden: Tensor, *inputs: Any, **arguments: Any) -> Any:
    if torch.is_grad_enabled() and not hidden.requires_grad:
        # The first layer over frozen embeddings: a gradient nobody reads costs less than a compilation for it alone.
        hidden = hidden.detach().requires_grad_()
    return _compiled_for_training(keep)(layer, hidden, *inputs, **arguments)


@cache
def _compiled_for_training(keep: Keep) -> Callable[..., Any]:
    contexts = _CONTEXTS[keep]

    def training_layer(layer: nn.Module, *inputs: Any, **arguments: Any) -> Any:
        def run(*inputs: Any) -> Any:
            return type(layer).forward(layer, *inputs, **arguments)

        if contexts is None or not torch.is_grad_enabled():
            return run(*inputs)
        return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

    return torch.compile(training_layer, dynamic=True)


class _Policy:
    """Says of each operation whether its result is kept: of the wide products every `every`-th, or none (0).

    The second product of a LoRA pair is never kept: made from few numbers, it costs no more to compute than to read.
    """

    def __init__(self, every: int) -> None:
        self.every, self.wide, self.width = every, 0, 0

    def __call__(self, _context: Any, operator: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
        keep = operator in _COSTLY
        if operator in _PRODUCTS:
            inner, outer = inputs[-1].shape
            self.width = self.width or inner  # a layer's first product reads its input
            if 2 * inner <= self.width:
                keep = False
            elif outer > 2 * inner:
                self.wide += 1
                keep = self.every > 0 and self.wide % self.every == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_cheap() -> Any:
    return create_selective_checkpoint_contexts(_Policy(every=1))


def _keep_half() -> Any:
    return create_selective_checkpoint_contexts(_Policy(every=2))


def _keep_mlp() -> Any:
    return create_selective_checkpoint_contexts(_Policy(every=0))


_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
_COSTLY = _PRODUCTS | {
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}

_CONTEXTS: dict[Keep, Callable[[], Any] | None] = {
    "all": None, "cheap": _keep_cheap, "half": _keep_half, "mlp": _keep_mlp,
}  # fmt: skip


def _decode_step(layer: nn.Module, hidden: Tensor, **arguments: Any) -> Any:
    rows = hidden.shape[0]
    for value in (hidden, *arguments.values()):
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.shape[0] == rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled_for_decoding()(layer, hidden, **arguments)


@cache
def _compiled_for_decoding() -> Callable[..., Any]:
    def decoding_layer(layer: nn.Module, hidden: Tensor, **arguments: Any) -> Any:
        return type(layer).forward(layer, hidden, **arguments)

    return torch.compile(decoding_layer)
