"""Supervised token losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aligntune.algorithms.sft import dft


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_token_of_probability_one_half():
    logits = tensor([0.0, 0.0]).requires_grad_()
    loss = dft(logits.log_softmax(0)[0])
    loss.backward()
    assert loss.item() == pytest.approx(0.346574, abs=1e-6)
    assert logits.grad[0].item() == pytest.approx(-0.25)


def test_it_is_cross_entropy_times_the_probability_in_value_and_gradient():
    for p in (0.01, 0.3, 0.9):
        log_p = tensor(math.log(p)).requires_grad_()
        loss = dft(log_p)
        loss.backward()
        assert loss.item() == pytest.approx(-p * math.log(p))
        assert log_p.grad.item() == pytest.approx(-p)


def test_it_is_at_most_one_over_e():
    values = dft(torch.linspace(1e-4, 1, 10001, dtype=torch.float64).log())
    assert values.max().item() == pytest.approx(1 / math.e, abs=1e-7)
