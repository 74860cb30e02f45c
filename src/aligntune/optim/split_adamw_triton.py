"""The CUDA kernel behind `SplitAdamW`: one launch for all tensors, each number read and written once.

A table on the GPU names the tensors by their addresses; a map says of each block whose numbers it updates. So a step costs
the host a launch and a small copy, whatever the number of tensors (torch's `_foreach` kernels work alike), or two of each where
some addresses are odd.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from aligntune.optim.split_adamw import Parts, Step

BLOCK = 2048
WIDE = 16
"""Bytes that a thread reads at once, where addresses and counts are multiples of it."""


@triton.jit
def _noise(place, salt):  # noqa: ANN202  (a device function)
    x = place * -0x61C88647 + salt
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975
    return (x >> 16) & 0xFFFF


@triton.jit
def _rounded(value, place, salt):  # noqa: ANN202
    bits = value.to(tl.int32, bitcast=True) + _noise(place, salt)
    return (bits >> 16).to(tl.int16)


@triton.jit
def _address(entry, element: tl.constexpr, WIDE: tl.constexpr):  # noqa: ANN202
    found = tl.load(entry).to(tl.pointer_type(element))
    return tl.multiple_of(found, WIDE)


@triton.jit
def _split_updates(
    table, blocks, rate1, beta2, rate2, eps, decay, step_size, root_correction, HALF: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """`table` [tensors, 7] and `blocks` [programs, 2], as `_table` and `_blocks` make them. `HALF`: moments are bfloat16, as int16.
    `WIDE`: what all addresses and counts are multiples of."""
    MOMENT: tl.constexpr = tl.int16 if HALF else tl.float32
    block = blocks + 2 * tl.program_id(0)
    row = table + 7 * tl.load(block)
    weight, rest = _address(row, tl.int16, WIDE), _address(row + 1, tl.int16, WIDE)
    grad = _address(row + 2, tl.bfloat16, WIDE)
    exp_avg, exp_avg_sq = _address(row + 3, MOMENT, WIDE), _address(row + 4, MOMENT, WIDE)
    salt = tl.load(row + 6).to(tl.int32)
    place = tl.load(block + 1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.multiple_of(tl.load(row + 5).to(tl.int32), WIDE)
    upper = tl.load(weight + place, mask=inside, other=0).to(tl.int32)
    whole = ((upper << 16) + tl.load(rest + place, mask=inside, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if HALF:
        first = (tl.load(exp_avg + place, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        second = (tl.load(exp_avg_sq + place, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        first = tl.load(exp_avg + place, mask=inside, other=0.0)
        second = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    first = first + rate1 * (g - first)
    second = second * beta2 + rate2 * g * g
    whole = whole * decay - step_size * first / (tl.sqrt(second) / root_correction + eps)
    bits = whole.to(tl.int32, bitcast=True)
    upper = (bits + 0x8000) >> 16
    tl.store(weight + place, upper.to(tl.int16), mask=inside)
    tl.store(rest + place, (bits - (upper << 16)).to(tl.int16), mask=inside)
    if HALF:
        tl.store(exp_avg + place, _rounded(first, place, salt), mask=inside)
        tl.store(exp_avg_sq + place, _rounded(second, place, salt + 1), mask=inside)
    else:
        tl.store(exp_avg + place, first, mask=inside)
        tl.store(exp_avg_sq + place, second, mask=inside)


def split_updates_triton(tensors: Sequence[Parts], step: Step) -> None:
    """`split_update` of each, on one CUDA device."""
    launches: defaultdict[tuple[bool, bool], list[Parts]] = defaultdict(list)
    for parts in tensors:
        ready = parts._replace(grad=_laid_out(parts.grad, parts.weight))
        launches[_is_wide(ready), ready.exp_avg.dtype == torch.bfloat16].append(ready)
    with torch.cuda.device_of(tensors[0].weight):  # on the stream of which Triton launches
        for (wide, half), chosen in launches.items():
            blocks = _blocks(tuple(parts.weight.numel() for parts in chosen), chosen[0].weight.device)
            _split_updates[(len(blocks),)](
                _table(chosen), blocks, 1 - step.beta1, step.beta2, 1 - step.beta2, step.eps, step.decay, step.step_size, step.root_correction,
                HALF=half, WIDE=WIDE if wide else 1, BLOCK=BLOCK,
            )  # fmt: skip


def _laid_out(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient with its numbers in the order of the weight's."""
    same = grad.stride() == weight.stride() and grad.dtype == weight.dtype
    return grad if same else torch.empty_like(weight).copy_(grad)


def _is_wide(parts: Parts) -> bool:
    """Not so where gradients are views of a bucket, or of a tensor of an odd size."""
    return all(tensor.data_ptr() % WIDE == 0 for tensor in parts[:5]) and parts.weight.numel() % WIDE == 0


def _table(tensors: Sequence[Parts]) -> Tensor:
    """`[tensors, 7]`: five addresses, count and salt of each. Gradients move from step to step, so that it is made anew."""
    rows = [[*(tensor.data_ptr() for tensor in parts[:5]), parts.weight.numel(), parts.salt] for parts in tensors]
    device = tensors[0].weight.device
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@lru_cache(maxsize=4)
def _blocks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """`[programs, 2]` int32: the tensor of each block, and which of its blocks it is."""
    each = torch.tensor([triton.cdiv(count, BLOCK) for count in counts])
    owner = torch.repeat_interleave(torch.arange(len(counts)), each)
    return torch.stack([owner, torch.arange(len(owner)) - (each.cumsum(0) - each)[owner]], 1).int().to(device)
