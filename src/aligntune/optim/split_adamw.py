"""AdamW on bfloat16 weights that loses nothing: the float32 master weight is split into the weight and its rest.

A bfloat16 number is the upper half of a float32. So the 32 bits of a master weight are kept as the bfloat16 weight, which
the model computes with, and a 16-bit rest, which only the optimiser reads: `master = (weight << 16) + rest` on their
bits. Updates happen on the master in float32, exactly as with float32 weights under autocast, at 2 + 2 bytes a weight for
4 (and 2 a gradient for 4).

Moments are float32, or bfloat16 rounded stochastically: a plain bfloat16 `v` would stop decaying, since
`(1 - beta2) v` is less than half of its last digit. The noise is a hash of step and place, so that all replicas and a
resumed run round alike.

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101. Stochastic rounding: Gupta et al. 2015, arXiv 1502.02551.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aligntune.errors import ConfigError

ROUND_UP = 0x8000
"""Half of a bfloat16's last digit, in bits of a float32."""


LARGEST = 2**31 - 1
"""Numbers of the largest weight."""


class Step(NamedTuple):
    """The numbers of one update, the same for all tensors of a group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    """What a weight is multiplied by before the update: 1 - lr * weight_decay."""
    step_size: float
    """lr over the bias correction of the first moment."""
    root_correction: float
    """Square root of the bias correction of the second moment."""


class Parts(NamedTuple):
    """One bfloat16 parameter and what its update reads and writes, `[N]` each or of one shape and layout."""

    weight: Tensor
    rest: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    salt: int
    """Tells this step and tensor from others, for the noise of rounding."""


class SplitAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` for bfloat16 parameters, with exact float32 masters; other parameters are updated as they are.

    `moments`: format of the two moments of bfloat16 parameters, float32 or bfloat16. Gradients are those autograd gives, in
    the parameter's format: micro-batches are accumulated in bfloat16. The rest of a weight's first step is zero, as
    for a float32 copy of a bfloat16 checkpoint.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, moments: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moments = moments

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together: defaultdict[tuple[Step, torch.device], list[Parts]] = defaultdict(list)
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                state["step"] += 1
                numbers, moments = _numbers(group, state["step"]), (state["exp_avg"], state["exp_avg_sq"])
                if "rest" in state:
                    salt = (state["step"] * 0x9E3779B1 + place * 0x85EBCA77) & 0x7FFFFFFF
                    parts = Parts(parameter.data, state["rest"], parameter.grad, *moments, salt)
                    together[numbers, parameter.device].append(parts)
                else:
                    update(parameter.data, parameter.grad, *moments, numbers)
        for (numbers, _), tensors in together.items():
            split_updates(tensors, numbers)
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            split = parameter.dtype == torch.bfloat16
            if split and parameter.numel() > LARGEST:
                raise ConfigError(
                    f"adamw_split counts the numbers of a weight in 32 bits, and one has {parameter.numel():,}: use another optimizer"
                )
            dtype = self.moments if split else parameter.dtype
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
            if split:
                state["rest"] = torch.zeros_like(parameter, dtype=torch.int16)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round every part of the state to the parameter's format: each keeps its own."""
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for part, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][part] = value.detach().to(parameter.device, copy=True)


def _numbers(group: dict[str, Any], step: int) -> Step:
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    return Step(
        lr, beta1, beta2, group["eps"], 1 - lr * group["weight_decay"], lr / correction1, math.sqrt(correction2)
    )


def update(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Step) -> None:
    """One AdamW update in place, in the format of the tensors (of one shape)."""
    weight.mul_(step.decay)
    exp_avg.lerp_(grad, 1 - step.beta1)
    exp_avg_sq.mul_(step.beta2).addcmul_(grad, grad, value=1 - step.beta2)
    denominator = (exp_avg_sq.sqrt() / step.root_correction).add_(step.eps)
    weight.addcdiv_(exp_avg, denominator, value=-step.step_size)


def split_updates(tensors: Sequence[Parts], step: Step) -> None:
    """`update` of bfloat16 weights and their rests, in place, on one device: all tensors in one launch on CUDA, else one by one."""
    if tensors[0].weight.is_cuda:
        from aligntune.optim.split_adamw_triton import split_updates_triton

        split_updates_triton(tensors, step)
    else:
        for parts in tensors:
            split_update(parts, step)


def split_update(parts: Parts, step: Step) -> None:
    """`update` of one bfloat16 weight and its rest, in plain torch: what the CUDA kernel must equal."""
    weight, rest, _, exp_avg, exp_avg_sq, salt = parts
    whole = master(weight, rest)
    first, second = exp_avg.float(), exp_avg_sq.float()
    update(whole, parts.grad.float(), first, second, step)
    upper, lower = split(whole)
    weight.copy_(upper)
    rest.copy_(lower)
    if exp_avg.dtype == torch.bfloat16:
        first, second = round_stochastically(first, salt), round_stochastically(second, salt + 1)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)


def master(weight: Tensor, rest: Tensor) -> Tensor:
    """The float32 weight of a bfloat16 `weight` and its int16 `rest`."""
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest bfloat16, int16 rest) of a float32 weight; ties round away from zero, so that the rest fits."""
    bits = whole.view(torch.int32)
    upper = (bits + ROUND_UP) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def round_stochastically(values: Tensor, salt: int) -> Tensor:
    """float32 as bfloat16: up or down with the probability that leaves the mean as it is."""
    bits = values.view(torch.int32) + noise(values.numel(), salt, values.device).view(values.shape)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def noise(count: int, salt: int, device: torch.device) -> Tensor:
    """`[count]` numbers in [0, 65536), a hash of place and salt (lowbias32 by C. Wellons)."""
    x = torch.arange(count, dtype=torch.int32, device=device) * -0x61C88647 + salt
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975
    return (x >> 16) & 0xFFFF
