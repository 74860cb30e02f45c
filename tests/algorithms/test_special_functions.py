"""Functions without cancellation, against 100 digits."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligntune.algorithms.special import (
    entropic_remainder,
    exp_remainder,
    generalized_kl,
    probability_difference,
)

mp.mp.dps = 100

REACH = 1e-20
"""100 digits of the plain form hold 60 of the result for arguments down to here."""

small_or_large = st.floats(-30, 30) | st.floats(-1e-3, 1e-3) | st.sampled_from([0.0, 0.5, -0.5, 0.4999999, 1e-20])
log_probability = st.floats(-30, 0, width=32) | st.floats(-(2.0**-10), 0, width=32)


def relative_error(got: float, expected: mp.mpf) -> float:
    return float(abs(got - expected) / abs(expected)) if expected else abs(got)


@given(small_or_large)
def test_exp_remainder(x):
    got = exp_remainder(torch.tensor(x, dtype=torch.float64)).item()
    expected = mp.exp(x) - 1 - mp.mpf(x)
    assert got >= 0
    if abs(x) >= REACH:
        assert relative_error(got, expected) < 4e-15


def test_the_plain_form_has_no_digit_left_where_ours_has_six():
    x = torch.tensor(1e-4, dtype=torch.float32)
    expected = mp.exp(float(x)) - 1 - mp.mpf(float(x))
    assert relative_error(exp_remainder(x).item(), expected) < 3e-7
    assert relative_error((torch.exp(x) - 1 - x).item(), expected) > 0.5


@given(st.floats(-0.999, 1000) | st.floats(-1e-3, 1e-3))
def test_entropic_remainder(r):
    got = entropic_remainder(torch.tensor(r, dtype=torch.float64)).item()
    expected = (1 + mp.mpf(r)) * mp.log1p(mp.mpf(r)) - mp.mpf(r)
    if abs(r) >= REACH:
        assert relative_error(got, expected) < 1e-14


@given(log_probability, log_probability)
def test_probability_difference_in_float32(log_p, log_q):
    got = probability_difference(torch.tensor(log_p), torch.tensor(log_q)).item()
    expected = mp.exp(log_p) - mp.exp(log_q)
    if abs(expected) > 1e-30:
        assert relative_error(got, expected) < 5e-7


@given(log_probability, log_probability)
def test_generalized_kl_in_float32(log_p, log_q):
    got = generalized_kl(torch.tensor(log_p), torch.tensor(log_q)).item()
    p, q = mp.exp(log_p), mp.exp(log_q)
    expected = p * (mp.mpf(log_p) - mp.mpf(log_q)) - p + q
    assert got >= 0
    if expected > 1e-30:
        assert relative_error(got, expected) < 2e-6


@pytest.mark.parametrize("function", [probability_difference, generalized_kl])
def test_gradients_are_finite_for_extreme_probabilities(function):
    log_p = torch.tensor([0.0, -200.0, -200.0, -1e4, -0.1], requires_grad=True)
    log_q = torch.tensor([-200.0, 0.0, -200.0, -1.0, -0.1])
    function(log_p, log_q).sum().backward()
    assert torch.isfinite(log_p.grad).all()
