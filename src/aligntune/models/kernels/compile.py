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
from typing import Any, Literal

import torch
import torch.nn.attention.varlen
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def compile_layers(causal: Any, *, save: Literal["all", "matmuls"] = "all") -> int:
    """Compile the decoder layers of a transformers model for training, in place; returns how many. Undone by
    `restore_layers`. The first step then takes some ten seconds on a GPU.

    `save`: what a layer keeps for its backward pass. "all" is the compiler's choice, made for speed; "matmuls" keeps the
    results of matrix products and attention and recomputes what lies between them, which is cheap (selective
    activation checkpointing, Korthikanti et al. 2022, arXiv 2205.05198).
    """
    return _replace(causal, _training_step if save == "all" else _thrifty_step)


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


def _training_step(layer: nn.Module, *inputs: Any, **arguments: Any) -> Any:
    return _compiled_for_training()(layer, *inputs, **arguments)


@cache
def _compiled_for_training() -> Callable[..., Any]:
    def training_layer(layer: nn.Module, *inputs: Any, **arguments: Any) -> Any:
        return type(layer).forward(layer, *inputs, **arguments)

    return torch.compile(training_layer, dynamic=True)


def _thrifty_step(layer: nn.Module, *inputs: Any, **arguments: Any) -> Any:
    return _compiled_for_thrift()(layer, *inputs, **arguments)


@cache
def _compiled_for_thrift() -> Callable[..., Any]:
    contexts = partial(create_selective_checkpoint_contexts, _policy)

    def thrifty_layer(layer: nn.Module, *inputs: Any, **arguments: Any) -> Any:
        def run(*inputs: Any) -> Any:
            return type(layer).forward(layer, *inputs, **arguments)

        return checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)

    return torch.compile(thrifty_layer, dynamic=True)


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _COSTLY else CheckpointPolicy.PREFER_RECOMPUTE


_COSTLY = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


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
