"""The CUDA kernel behind `SplitAdamW`: one launch a tensor, each number read and written once."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aligntune.optim.split_adamw import Step

BLOCK = 1024


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
def _split_update(
    weight, rest, grad, exp_avg, exp_avg_sq, count, rate1, beta2, rate2, eps, decay, step_size, root_correction, salt,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
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


def split_update_triton(
    weight: Tensor, rest: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Step
) -> None:
    """`split_update` on CUDA, `[N]` each."""
    half = exp_avg.dtype == torch.bfloat16
    moments = [x.view(torch.int16) if half else x for x in (exp_avg, exp_avg_sq)]
    _split_update[(triton.cdiv(len(weight), BLOCK),)](
        weight.view(torch.int16), rest, grad, *moments, len(weight), 1 - step.beta1, step.beta2, 1 - step.beta2, step.eps,
        step.decay, step.step_size, step.root_correction, step.salt, HALF=half, BLOCK=BLOCK,
    )  # fmt: skip
