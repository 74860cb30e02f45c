"""The neural mirror map: its divergence against 50 digits, its gradient, its closed forms."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.algorithms.mirror_map import GROUP, SIMPLE_DIVERGENCES, SIZE, UNITS, MirrorMap
from aligntune.errors import ConfigError

mp.mp.dps = 50

ACTIVATIONS = [
    lambda u: u**3,
    lambda u: u**2,
    mp.sqrt,
    mp.cbrt,
    lambda u: mp.log(u + mp.mpf("1e-3")),
    mp.exp,
]
INTEGRALS = [
    lambda u: u**4 / 4,
    lambda u: u**3 / 3,
    lambda u: 2 * u ** mp.mpf("1.5") / 3,
    lambda u: 3 * u ** (mp.mpf(4) / 3) / 4,
    lambda u: (u + mp.mpf("1e-3")) * mp.log(u + mp.mpf("1e-3")) - (u + mp.mpf("1e-3")),
    mp.exp,
]


def parameters(phi):
    numbers = [mp.mpf(x) for x in phi]
    return numbers[:UNITS], numbers[UNITS : 2 * UNITS], numbers[2 * UNITS : 3 * UNITS], *numbers[-2:]


def exact_slope(y, phi):
    v, w, b, a, c = parameters(phi)
    units = sum(v[j] * ACTIVATIONS[j // GROUP](w[j] * y + b[j]) for j in range(UNITS))
    return units + a * y + c * mp.log(y)


def exact_potential(y, phi):
    v, w, b, a, c = parameters(phi)
    units = sum(v[j] / w[j] * INTEGRALS[j // GROUP](w[j] * y + b[j]) for j in range(UNITS))
    return units + a * y * y / 2 + c * (y * mp.log(y) - y)


def exact_divergence(p, q, phi):
    return exact_potential(p, phi) - exact_potential(q, phi) - exact_slope(q, phi) * (p - q)


def in_float32(*values):
    """Log-probabilities as the float32 numbers that a model would give."""
    return [torch.tensor([math.log(x)], dtype=torch.float32) for x in values]


def cases():
    """q from 1e-6 to 1 and p at a distance of 0.3 down to 3e-4 on either side, where both are probabilities."""
    for q in (1e-6, 1e-3, 0.02, 0.5, 0.97, 1.0):
        for distance in (0.3, 0.03, 3e-3, 3e-4):
            for p in (q + distance, q - distance):
                if 1e-6 <= p <= 1:
                    yield p, q
    yield 1e-6, 1.0
    yield 1.0, 1e-6


@pytest.mark.parametrize("scale", [0.01, 1.0])
@pytest.mark.parametrize(("p", "q"), cases())
def test_divergence_and_gradient_in_float32_against_50_digits(p, q, scale):
    mirror = MirrorMap.random(seed=42, scale=scale)
    phi = mirror.phi.float().tolist()  # what a float32 evaluation sees
    log_p, log_q = in_float32(p, q)
    log_p.requires_grad_()
    value = mirror.divergence(log_p, log_q)
    value.backward()
    exact_p, exact_q = mp.exp(log_p.item()), mp.exp(log_q.item())
    expected = exact_divergence(exact_p, exact_q, phi)
    assert value.item() >= 0
    assert abs(value.item() - expected) < 2e-6 * expected
    slope = exact_p * (exact_slope(exact_p, phi) - exact_slope(exact_q, phi))
    assert abs(log_p.grad.item() - slope) < 2e-6 * abs(slope)


def test_float64_against_50_digits():
    mirror = MirrorMap.random(seed=1)
    for p, q in ((0.6, 0.5), (0.5001, 0.5), (0.011, 0.01), (0.5 + 1e-9, 0.5)):
        log_p, log_q = (torch.tensor(math.log(x), dtype=torch.float64) for x in (p, q))
        expected = exact_divergence(mp.exp(log_p.item()), mp.exp(log_q.item()), mirror.phi.tolist())
        assert abs(mirror.divergence(log_p, log_q).item() - expected) < 1e-12 * expected


def only(**values) -> MirrorMap:
    """A map with a few parameters set: v, w, b as {unit: value}, a and c as numbers."""
    phi = torch.zeros(SIZE, dtype=torch.float64)
    for offset, name in enumerate("vwb"):
        for unit, value in values.get(name, {}).items():
            phi[offset * UNITS + unit] = value
    phi[-2], phi[-1] = values.get("a", 0.0), values.get("c", 0.0)
    return MirrorMap(phi)


def at(mirror, p, q):
    return mirror.divergence(*(torch.tensor(math.log(x), dtype=torch.float64) for x in (p, q))).item()


P, Q = 0.6, 0.5


@pytest.mark.parametrize(
    ("mirror", "expected"),
    [
        (only(a=1.0), 0.005),
        (only(c=1.0), 0.00939293),
        (only(v={0: 1.0}, w={0: 1.0}), 0.004275),  # (p^4 - q^4) / 4 - q^3 (p - q)
        (only(v={21: 1.0}, w={21: 1.0}), (P**3 - Q**3) / 3 - Q**2 * (P - Q)),
        (only(v={42: 1.0}, w={42: 1.0}), 2 / 3 * (P**1.5 - Q**1.5) - Q**0.5 * (P - Q)),
        (only(v={63: 1.0}, w={63: 1.0}), 3 / 4 * (P ** (4 / 3) - Q ** (4 / 3)) - Q ** (1 / 3) * (P - Q)),
        (
            only(v={84: 1.0}, w={84: 1.0}),
            0.601 * math.log(0.601) - 0.501 * math.log(0.501) - (P - Q) - math.log(0.501) * (P - Q),
        ),
        (only(v={105: 1.0}, w={105: 1.0}), math.exp(P) - math.exp(Q) - math.exp(Q) * (P - Q)),
        (only(v={0: 1.0}), 0.0),  # a unit of width 0 is a constant
    ],
)
def test_closed_forms(mirror, expected):
    assert at(mirror, P, Q) == pytest.approx(expected, rel=1e-5 if expected == 0.00939293 else 1e-10, abs=1e-13)


def test_divergence_is_linear_in_v_a_and_c():
    one, other = only(v={3: 1.0}, w={3: 0.7}, a=2.0), only(v={3: 0.5}, w={3: 0.7}, c=1.5)
    both = only(v={3: 1.5}, w={3: 0.7}, a=2.0, c=1.5)
    assert at(both, 0.3, 0.7) == pytest.approx(at(one, 0.3, 0.7) + at(other, 0.3, 0.7))


def test_only_c_is_the_generalised_kl():
    for p, q in ((0.9, 0.1), (0.1, 0.9), (0.3, 0.31)):
        log_p, log_q = in_float32(p, q)
        expected = SIMPLE_DIVERGENCES["kl"](log_p, log_q).item()
        assert only(c=1.0).divergence(log_p, log_q).item() == pytest.approx(expected)


def test_second_order():
    """D ~ h''(q) (p - q)^2 / 2, with h'' from the slope."""
    mirror, q, step = MirrorMap.random(seed=2), 0.4, 1e-5
    points = torch.tensor([q + step, q - step], dtype=torch.float64)
    above, below = mirror.slope(points).tolist()
    curvature = (above - below) / (2 * step)
    assert at(mirror, q + 1e-4, q) == pytest.approx(curvature * 1e-8 / 2, rel=1e-3)


def test_slope_and_potential_for_plots():
    mirror = MirrorMap.random(seed=2)
    phi = mirror.phi.tolist()
    for y in (0.05, 0.9):
        assert mirror.slope(torch.tensor(y, dtype=torch.float64)).item() == pytest.approx(
            float(exact_slope(mp.mpf(y), phi))
        )
    p, q = torch.tensor([0.9, 0.05], dtype=torch.float64)
    difference = mirror.potential(p) - mirror.potential(q) - mirror.slope(q) * (p - q)
    assert difference.item() == pytest.approx(at(mirror, 0.9, 0.05))


log_probability = st.floats(-60, 0, width=32)


@settings(max_examples=60, deadline=None)
@given(log_probability, log_probability, st.integers(0, 20), st.sampled_from([0.01, 1.0, 20.0]))
def test_never_negative_never_infinite(log_p, log_q, seed, scale):
    p = torch.tensor([log_p], requires_grad=True)
    value = MirrorMap.random(seed, scale).divergence(p, torch.tensor([log_q]))
    value.backward()
    assert 0 <= value.item() < math.inf
    assert p.grad.isfinite().all()


@settings(max_examples=30, deadline=None)
@given(log_probability)
def test_zero_with_zero_gradient_where_p_is_q(log_p):
    for divergence in (MirrorMap.random(0).divergence, *SIMPLE_DIVERGENCES.values()):
        p = torch.tensor([log_p], requires_grad=True)
        value = divergence(p, torch.tensor([log_p]))
        value.backward()
        assert value.item() == 0
        assert p.grad.item() == 0


def test_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (-3 * torch.rand(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    log_p.requires_grad_()
    for divergence in (MirrorMap.random(5, scale=1.0).divergence, *SIMPLE_DIVERGENCES.values()):
        assert torch.autograd.gradcheck(lambda x, d=divergence: d(x, log_q), (log_p,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("prob_l2", 0.01, 2 * 0.1 * 0.6),
        ("log_l2", math.log(1.2) ** 2, 2 * math.log(1.2)),
        ("kl", 0.6 * math.log(1.2) - 0.1, 0.6 * math.log(1.2)),
    ],
)
def test_simple_divergences(name, value, gradient):
    log_p = torch.tensor(math.log(0.6), dtype=torch.float64, requires_grad=True)
    result = SIMPLE_DIVERGENCES[name](log_p, torch.tensor(math.log(0.5), dtype=torch.float64))
    result.backward()
    assert result.item() == pytest.approx(value)
    assert log_p.grad.item() == pytest.approx(gradient)


def test_large_batches_go_in_pieces():
    generator = torch.Generator().manual_seed(0)
    log_p = -torch.rand(3, 7000, generator=generator)
    log_q = -torch.rand(3, 7000, generator=generator)
    mirror = MirrorMap.random(0)
    pieces = torch.stack([mirror.divergence(p, q) for p, q in zip(log_p, log_q)])
    torch.testing.assert_close(mirror.divergence(log_p, log_q), pieces, atol=0, rtol=1e-6)


def test_unconstrained_parameters():
    mirror = MirrorMap.random(seed=9)
    torch.testing.assert_close(
        MirrorMap.from_unconstrained(mirror.to_unconstrained()).phi, mirror.phi, atol=1e-13, rtol=1e-9
    )
    wild = MirrorMap.from_unconstrained(torch.linspace(-1e3, 1e3, SIZE, dtype=torch.float64)).phi
    assert wild.min() >= 0
    assert wild.max() == 20
    theta = torch.full((SIZE,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(MirrorMap.from_unconstrained(theta).phi, theta)
    zero = MirrorMap(torch.zeros(SIZE, dtype=torch.float64)).to_unconstrained()
    assert zero.isfinite().all()


def test_save_and_load_are_exact(tmp_path):
    mirror = MirrorMap.random(seed=9)
    mirror.save(tmp_path / "map.json")
    assert torch.equal(MirrorMap.load(tmp_path / "map.json").phi, mirror.phi)
    assert mirror.phi.min() >= 0
    assert mirror.phi.max() <= 0.01


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "not json", '["a"]'])
def test_a_file_that_is_no_map_is_refused(tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ConfigError):
        MirrorMap.load(tmp_path / "map.json")


@pytest.mark.parametrize("bad", [-0.1, 21.0, math.nan])
def test_parameters_out_of_range_are_refused(bad):
    phi = torch.zeros(SIZE)
    phi[7] = bad
    with pytest.raises(ConfigError, match=r"\[0, 20\]"):
        MirrorMap(phi)
