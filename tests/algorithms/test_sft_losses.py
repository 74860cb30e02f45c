"""Supervised token losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aligntune.algorithms.sft import supervised_loss, token_loss
from aligntune.errors import ConfigError


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("loss_type", "value", "slope"), [("nll", 0.693147, -0.5), ("dft", 0.346574, -0.25)])
def test_a_token_of_probability_one_half(loss_type, value, slope):
    logits = tensor([0.0, 0.0]).requires_grad_()
    loss = token_loss(loss_type, logits.log_softmax(0)[0])
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert logits.grad[0].item() == pytest.approx(slope)


def test_dft_is_nll_times_the_probability_in_value_and_gradient():
    for p in (0.01, 0.3, 0.9):
        nll_log_p, dft_log_p = (tensor(math.log(p)).requires_grad_() for _ in range(2))
        nll, dft = token_loss("nll", nll_log_p), token_loss("dft", dft_log_p)
        nll.backward()
        dft.backward()
        assert dft.item() == pytest.approx(p * nll.item())
        assert dft_log_p.grad.item() == pytest.approx(p * nll_log_p.grad.item())


def test_dft_is_at_most_one_over_e():
    values = token_loss("dft", torch.linspace(1e-4, 1, 10001, dtype=torch.float64).log())
    assert values.max().item() == pytest.approx(1 / math.e, abs=1e-7)


def test_shares_add_up_to_the_mean_over_all_tokens():
    """Log-probabilities -3 | -1 -1 -1 in micro-batches of one row: 6 / 4, not (3 + 1) / 2."""
    rows = tensor([[-3.0, math.nan, math.nan], [-1.0, -1.0, -1.0]])
    mask = tensor([[1, 0, 0], [1, 1, 1]])
    shares = [supervised_loss("nll", rows[i : i + 1], mask[i : i + 1], mask.sum()) for i in (0, 1)]
    assert sum(shares).item() == pytest.approx(1.5)
    assert supervised_loss("nll", rows, mask, mask.sum()).item() == pytest.approx(1.5)


def test_label_smoothing_is_cross_entropy_with_a_smoothed_target():
    logits = tensor([[0.3, -0.2, 1.0], [0.0, 2.0, 0.5]])
    log_probs, targets = logits.log_softmax(1), torch.tensor([2, 0])
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    got = supervised_loss(
        "nll", log_probs[[0, 1], targets], torch.ones(2), 2, label_smoothing=0.1, mean_log_probs=log_probs.mean(1)
    )
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="mean log-probability"):
        supervised_loss("nll", log_probs[:, 0], torch.ones(2), 2, label_smoothing=0.1)


def test_nothing_to_train_costs_nothing():
    log_probs = tensor([math.nan]).requires_grad_()
    loss = supervised_loss("dft", log_probs, torch.zeros(1), 0)
    loss.backward()
    assert loss.item() == 0
    assert log_probs.grad.item() == 0


def test_unknown_losses_are_refused():
    with pytest.raises(ConfigError, match="nll or dft"):
        token_loss("focal", tensor([0.0]))
