"""How do several products of one input become one while a model decodes, with the trainer's weights in place?

A decode step of a small model waits for kernels that are over in four microseconds, and three of the seven products of a layer
(keys, values, one half of the gated MLP) could be part of another's. So the weights that read one input are laid behind
one another in memory, once: each stays a parameter of its own, a window of the whole, and the whole is multiplied by. No weight
is kept twice, and what the optimiser writes is what the next rollout reads.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aligntune.models.kernels.compile import decoder_layers

READERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of modules that read one input, in the order in which a layer calls them."""
ALIGNED = 16
"""Bytes to which every window is aligned, as kernels expect of a weight."""


class Joint:
    """The product of several linear layers that are called with one input, one after another."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        self.weight, *biases = [_whole(parts) for parts in _parameters(linears)]
        self.bias = biases[0] if biases else None
        self.input: Tensor | None = None
        self.results: tuple[Tensor, ...] = ()

    def result(self, place: int, value: Tensor) -> Tensor:
        """What the layer at `place` gives for `value`: the first computes all, and they are kept for the others."""
        if place == 0:
            self.input, self.results = value, F.linear(value, self.weight, self.bias).split(self.sizes, -1)
        elif self.input is not value:  # a model that calls them in another way
            return F.linear(value, self.linears[place].weight, self.linears[place].bias)
        found = self.results[place]
        if place == len(self.linears) - 1:
            self.input, self.results = None, ()
        return found


@contextmanager
def joined(causal: Any) -> Iterator[None]:
    """Inside, and without gradients, layers whose weights `lay_together` found and laid are one product. Results are as before
    but for rounding."""
    changed: list[nn.Linear] = []
    try:
        for linears in _groups(causal):
            if _lie_together(linears):
                joint = Joint(linears)
                for place, linear in enumerate(linears):
                    vars(linear).update(_joint=joint, _place=place, forward=types.MethodType(_forward, linear))
                changed += linears
        yield
    finally:
        for linear in changed:
            for name in ("_joint", "_place", "forward"):
                del vars(linear)[name]


def lay_together(causal: Any) -> int:
    """Lay the weights of layers that read one input behind one another; returns how many groups lie so. May be called again:
    what lies right stays, and so do weights that somebody else (DeepSpeed) keeps in a buffer."""
    groups = list(_groups(causal))
    for linears in groups:
        for parts in _parameters(linears):
            if not _adjacent(parts) and all(part.untyped_storage().nbytes() == part.nbytes for part in parts):
                whole = torch.cat([part.data for part in parts])
                for part, window in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                    part.data = window
    return sum(map(_lie_together, groups))


def _forward(linear: Any, value: Tensor) -> Tensor:
    return cast(Tensor, linear._joint.result(linear._place, value))


def _groups(causal: Any) -> Iterator[list[nn.Linear]]:
    """Plain linear layers (LoRA's bases among them) that read one input and whose weights may lie together."""
    for layer in decoder_layers(causal):
        for module in _parents(layer):
            for names in READERS:
                found = [module._modules.get(name) for name in names]
                linears = [getattr(each, "base_layer", each) for each in found]
                if _can_join(linears):
                    yield cast(list[nn.Linear], linears)


def _parents(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those in it that have parts, but for LoRA's: a model of 24 layers has 2,000 of them, and rollouts look each time."""
    yield module
    for child in module._modules.values():
        if child is not None and child._modules and "base_layer" not in child._modules:
            yield from _parents(child)


def _can_join(linears: Sequence[Any]) -> bool:
    if any(type(linear) is not nn.Linear or "forward" in vars(linear) for linear in linears):
        return False
    if len({linear.bias is None for linear in linears}) > 1:
        return False
    parameters = _parameters(linears)
    if len({id(part) for parts in parameters for part in parts}) < sum(map(len, parameters)):
        return False  # one weight under two names
    return all(
        type(part) is nn.Parameter  # and not quantised, nor a shard
        and (part.dtype, part.device, part.shape[1:]) == (parts[0].dtype, parts[0].device, parts[0].shape[1:])
        and part.is_contiguous()
        and part.numel() * part.element_size() % ALIGNED == 0
        for parts in parameters
        for part in parts
    )


def _parameters(linears: Sequence[nn.Linear]) -> list[list[nn.Parameter]]:
    """Their weights, and their biases if they have any."""
    kinds = ("weight",) if linears[0].bias is None else ("weight", "bias")
    return [[getattr(linear, kind) for linear in linears] for kind in kinds]


def _lie_together(linears: Sequence[nn.Linear]) -> bool:
    return all(map(_adjacent, _parameters(linears)))


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether each begins where the one before it ends, in one piece of memory."""
    piece = parts[0].untyped_storage().data_ptr()
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    return all(
        part.untyped_storage().data_ptr() == piece and part.data_ptr() == end
        for part, end in zip(parts[1:], ends, strict=False)
    )


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """The memory of adjacent parameters as one tensor."""
    first = parts[0].data
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
