"""Which functions lose their digits when written the plain way?

Divergences between nearly equal distributions are differences of nearly equal numbers: in float32, `exp(x) - 1 - x`
has no correct digit left at |x| = 1e-4. Everything here is accurate to a few units in the last place for any argument.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SERIES_BELOW = 0.5
_SERIES_COEFFICIENTS = [1 / math.factorial(k) for k in range(17, 1, -1)]  # the next term is 0.5**16 / 18! of the first


def exp_remainder(x: Tensor) -> Tensor:
    """`exp(x) - 1 - x`, any shape: never negative, `x**2 / 2` near 0.

    Taylor series where |x| < 0.5, `expm1(x) - x` elsewhere. Overflows where `exp(x)` does: clamp before.
    """
    small = x.clamp(-_SERIES_BELOW, _SERIES_BELOW)
    series = torch.zeros_like(small)
    for coefficient in _SERIES_COEFFICIENTS:
        series = series * small + coefficient
    return torch.where(x.abs() < _SERIES_BELOW, series * small * small, torch.expm1(x) - x)


def entropic_remainder(r: Tensor) -> Tensor:
    """`(1 + r) log(1 + r) - r` for r > -1, any shape: the Bregman divergence of `y log y` between `1 + r` and 1.

    With `x = log(1 + r)` it is `exp(x) * exp_remainder(-x)`, which cancels nothing.
    """
    return (1 + r) * exp_remainder(-torch.log1p(r))


def probability_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`exp(log_p) - exp(log_q)`, any shape, to full relative precision also where the two nearly agree."""
    x = log_p - log_q
    from_below = log_q.exp() * torch.expm1(x.clamp(max=0.0))
    from_above = -log_p.exp() * torch.expm1(-x.clamp(min=0.0))
    return torch.where(x < 0, from_below, from_above)


def generalized_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`p log(p / q) - p + q`, any shape: the Bregman divergence of `y log y`, for one probability each.

    It is `p * k3`. For p far below q that form overflows, and the plain one is exact.
    """
    x = log_p - log_q
    p = log_p.exp()
    near = p * exp_remainder(-x.clamp(min=-1.0))
    far = log_q.exp() - p * (1 - x)
    return torch.where(x > -1.0, near, far)
