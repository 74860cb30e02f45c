"""How far apart are two probabilities? Bregman divergences for mirror-map methods (arXiv 2602.04380, 2402.05187).

A convex potential h gives D(p, q) = h(p) - h(q) - h'(q) (p - q), here of the policy's and the reference's probability of a
sampled token. The neural map has 126 units in six groups of 21:

    h'(y) = sum_j v_j act_j(w_j y + b_j) + a y + c log y,   act: u^3, u^2, u^(1/2), u^(1/3), log(u + 1e-3), e^u

with all 380 parameters phi = [v, w, b, a, c] >= 0, which makes h convex and D >= 0. Written plainly, D in float32 is mostly
rounding error when p and q are closer than 0.03, and negative half of the time. Every form below is a sum of non-negative
terms without cancellation: with u = w q + b and d = w (p - q), a unit's divergence is d^2 times a smooth function.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntune.algorithms.special import entropic_remainder, exp_remainder, generalized_kl, probability_difference
from aligntune.errors import ConfigError

UNITS = 126
GROUP = UNITS // 6
SIZE = 3 * UNITS + 2
INIT_SCALE = 0.01
MAX_PARAMETER = 20.0
"""exp(w + b) stays below exp(40), well inside float32."""

_LOG_SHIFT = 1e-3
_LEAST_WIDTH = 1e-8
_LEAST_INPUT = 1e-20
_CHUNK = 8192

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log p, log q) -> D(p, q), any shape, differentiable in log p."""


@dataclass(frozen=True, eq=False)
class MirrorMap:
    """The neural map with parameters phi: [380] float64, each in [0, 20], in the order v, w, b (126 each), a, c."""

    phi: Tensor

    def __post_init__(self) -> None:
        phi = torch.as_tensor(self.phi, dtype=torch.float64).detach().cpu()
        if phi.shape != (SIZE,):
            raise ConfigError(f"a mirror map has {SIZE} parameters, not {tuple(phi.shape)}")
        if not bool(((phi >= 0) & (phi <= MAX_PARAMETER)).all()):
            raise ConfigError(
                f"parameters of a mirror map lie in [0, {MAX_PARAMETER:g}]; use MirrorMap.from_unconstrained"
            )
        object.__setattr__(self, "phi", phi)

    @classmethod
    def random(cls, seed: int, scale: float = INIT_SCALE) -> MirrorMap:
        """Parameters drawn uniformly from [0, scale], as the paper does."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.rand(SIZE, generator=generator, dtype=torch.float64) * scale)

    @classmethod
    def from_unconstrained(cls, theta: Tensor | Sequence[float]) -> MirrorMap:
        """phi = s softplus(theta / s), s = INIT_SCALE: any real vector becomes a valid map. Above s the two are equal, so
        that a step of evolution has the same size in both; values over 20 are cut."""
        theta = torch.as_tensor(theta, dtype=torch.float64)
        return cls(
            torch.nn.functional.softplus(theta / INIT_SCALE, threshold=50.0).mul(INIT_SCALE).clamp(max=MAX_PARAMETER)
        )

    def to_unconstrained(self) -> Tensor:
        """The inverse of `from_unconstrained`; parameters below `INIT_SCALE * 1e-9` count as that."""
        y = (self.phi / INIT_SCALE).clamp(min=1e-9)
        return INIT_SCALE * (y + torch.log(-torch.expm1(-y)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MirrorMap:
        """Read the JSON list that `save` writes."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the mirror map {os.fspath(path)}: {error}") from error
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise ConfigError(f"{os.fspath(path)} is not a mirror map: expected a JSON list of {SIZE} numbers")
        return cls(torch.tensor(values, dtype=torch.float64))

    def save(self, path: str | os.PathLike[str]) -> None:
        """A JSON list of 380 numbers, exact to the bit."""
        Path(path).write_text(json.dumps(self.phi.tolist()), encoding="utf-8")

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D(p, q) of any shape, in the inputs' precision, with gradient for `log_p` only (`log_q` is the reference's)."""
        return _NeuralDivergence.apply(log_p, log_q, self.phi)  # type: ignore[no-any-return]

    def slope(self, y: Tensor) -> Tensor:
        """h'(y) for 0 < y <= 1, any shape; for plots."""
        v, w, b, a, c = self._parts()
        units = v * _per_group(_ACTIVATIONS, w * y.double().unsqueeze(-1) + b)
        return units.sum(-1) + a * y + c * y.double().log()

    def potential(self, y: Tensor) -> Tensor:
        """h(y) for 0 < y <= 1, up to a constant, any shape; for plots."""
        v, w, b, a, c = self._parts()
        y = y.double()
        units = v / w * _per_group(_INTEGRALS, w * y.unsqueeze(-1) + b)
        return units.sum(-1) + a / 2 * y.square() + c * (y * y.log() - y)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return split(self.phi)


def split(phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v, w, b [126] each, and a, c. A width w below 1e-8 counts as that: such a unit is a constant."""
    v, w, b, ends = phi.split([UNITS, UNITS, UNITS, 2])
    return v, w.clamp(min=_LEAST_WIDTH), b, ends[0], ends[1]


def _per_group(functions: Sequence[Callable[..., Tensor]], *inputs: Tensor) -> Tensor:
    """Apply the six functions to the six groups of units in the last dimension."""
    groups = zip(functions, *(x.split(GROUP, dim=-1) for x in inputs), strict=True)
    return torch.cat([function(*group) for function, *group in groups], dim=-1)


_ACTIVATIONS: tuple[Callable[..., Tensor], ...] = (
    lambda u: u**3,
    lambda u: u**2,
    torch.sqrt,
    lambda u: u ** (1 / 3),
    lambda u: torch.log(u + _LOG_SHIFT),
    torch.exp,
)

_INTEGRALS: tuple[Callable[..., Tensor], ...] = (
    lambda u: u**4 / 4,
    lambda u: u**3 / 3,
    lambda u: 2 / 3 * u**1.5,
    lambda u: 3 / 4 * u ** (4 / 3),
    lambda u: torch.xlogy(u + _LOG_SHIFT, u + _LOG_SHIFT) - (u + _LOG_SHIFT),
    torch.exp,
)


def _sqrt_divergence(u: Tensor, d: Tensor, up: Tensor) -> Tensor:
    s, t = up.sqrt(), u.sqrt()
    return d * d * (2 * s + t) / (3 * (s + t).square())


def _cbrt_divergence(u: Tensor, d: Tensor, up: Tensor) -> Tensor:
    s, t = up ** (1 / 3), u ** (1 / 3)
    return d * d * (3 * s * s + 2 * s * t + t * t) / (4 * (s * s + s * t + t * t).square())


def _cbrt_difference(u: Tensor, d: Tensor, up: Tensor) -> Tensor:
    s, t = up ** (1 / 3), u ** (1 / 3)
    return d / (s * s + s * t + t * t)


# w * D of one unit, from u = w q + b, d = w (p - q) and up = w p + b.
_UNIT_DIVERGENCES: tuple[Callable[..., Tensor], ...] = (
    lambda u, d, up: d * d * (6 * u * u + 4 * u * d + d * d) / 4,
    lambda u, d, up: d * d * (3 * u + d) / 3,
    _sqrt_divergence,
    _cbrt_divergence,
    lambda u, d, up: (u + _LOG_SHIFT) * entropic_remainder(d / (u + _LOG_SHIFT)),
    lambda u, d, up: u.exp() * exp_remainder(d),
)

# act(up) - act(u) of one unit.
_UNIT_DIFFERENCES: tuple[Callable[..., Tensor], ...] = (
    lambda u, d, up: d * (3 * u * u + 3 * u * d + d * d),
    lambda u, d, up: d * (2 * u + d),
    lambda u, d, up: d / (up.sqrt() + u.sqrt()),
    _cbrt_difference,
    lambda u, d, up: torch.log1p(d / (u + _LOG_SHIFT)),
    lambda u, d, up: u.exp() * torch.expm1(d),
)


def _neural(log_p: Tensor, log_q: Tensor, phi: Tensor, want_slope: bool) -> tuple[Tensor, Tensor]:
    """[n] D(p, q), and [n] dD/dlog p = p (h'(p) - h'(q)) where wanted."""
    v, w, b, a, c = split(phi)
    p, q, difference = log_p.exp(), log_q.exp(), probability_difference(log_p, log_q)
    u = (w * q.unsqueeze(-1) + b).clamp(min=_LEAST_INPUT)
    up = (w * p.unsqueeze(-1) + b).clamp(min=_LEAST_INPUT)
    d = w * difference.unsqueeze(-1)
    value = (v / w * _per_group(_UNIT_DIVERGENCES, u, d, up)).sum(-1)
    value = value + a / 2 * difference.square() + c * generalized_kl(log_p, log_q)
    if not want_slope:
        return value, value
    slope = (v * _per_group(_UNIT_DIFFERENCES, u, d, up)).sum(-1) + a * difference + c * (log_p - log_q)
    return value, p * slope


class _NeuralDivergence(torch.autograd.Function):
    """Keeps one number a token for the backward pass, not the activations of 126 units."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor, phi: Tensor) -> Tensor:
        phi = phi.to(log_p.device, log_p.dtype)
        flat_p, flat_q = log_p.reshape(-1), log_q.reshape(-1)
        values, slopes = torch.empty_like(flat_p), torch.empty_like(flat_p)
        for start in range(0, len(flat_p), _CHUNK):
            part = slice(start, start + _CHUNK)
            values[part], slopes[part] = _neural(flat_p[part], flat_q[part], phi, ctx.needs_input_grad[0])
        ctx.save_for_backward(slopes.view_as(log_p))
        return values.view_as(log_p)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return gradient * slopes, None, None


def squared_probability_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(p - q)^2, the paper's ProbL2: h = y^2. Its gradient in log p is 2 p (p - q), at most 2."""
    return probability_difference(log_p, log_q).square()


def squared_log_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(log p - log q)^2, the paper's L2. Not a Bregman divergence of p; kept for comparison."""
    return (log_p - log_q).square()


SIMPLE_DIVERGENCES: dict[str, Divergence] = {
    "kl": generalized_kl,
    "prob_l2": squared_probability_difference,
    "log_l2": squared_log_difference,
}
