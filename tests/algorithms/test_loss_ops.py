"""The small operations, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aligntune.algorithms import Normalizers, ops
from aligntune.errors import ConfigError

NAN = math.nan


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two rows of 1 and 3 tokens, advantages +1 and -1, ratio 1: token losses -1 | 1 1 1. Padding holds NaN.
TOKEN_LOSSES = tensor([[-1.0, NAN, NAN], [1.0, 1.0, 1.0]])
MASK = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sequence_mean", 0.0),  # (-1 + 1) / 2
        ("token_mean", 0.5),  # (-1 + 3) / 4
        ("constant", 0.25),  # (-1 + 3) / (2 * 4)
    ],
)
def test_reductions(reduction, expected):
    value = ops.REDUCTIONS[reduction](TOKEN_LOSSES, MASK, Normalizers(2, MASK.sum(), max_completion_length=4))
    assert value.item() == pytest.approx(expected, abs=1e-15)


def test_the_constant_reduction_asks_for_its_constant():
    with pytest.raises(ValueError, match="max_completion_length"):
        ops.constant(TOKEN_LOSSES, MASK, Normalizers(2, 4))


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_kl_estimators(estimator, expected):
    difference = tensor(-1.0) - tensor(-1.5)
    assert ops.kl(estimator, difference).item() == pytest.approx(expected, rel=1e-14)


def test_k3_golden():
    assert ops.kl("k3", tensor(0.5)).item() == pytest.approx(0.106531, abs=5e-7)


def test_kl_estimators_in_expectation():
    p, q = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum()
    difference = (p / q).log()
    assert exact.item() == pytest.approx(0.274887, abs=5e-7)
    for unbiased in ("k1", "k3"):
        assert (p * ops.kl(unbiased, difference)).sum().item() == pytest.approx(exact.item(), rel=1e-14)
    assert (p * ops.kl("k2", difference)).sum().item() == pytest.approx(0.293856, abs=5e-7)


def test_what_each_estimator_descends_as_a_loss():
    """Expected gradients under on-policy sampling, for logits of pi: zero, that of KL(pi || ref), that of KL(ref || pi)."""
    ref = tensor([0.2, 0.3, 0.5])

    def gradient(objective):
        logits = tensor([1.0, 0.2, -0.4]).requires_grad_()
        objective(logits.log_softmax(0)).backward()
        return logits.grad

    def as_loss(estimator):
        return lambda log_p: (log_p.detach().exp() * ops.kl(estimator, log_p - ref.log())).sum()

    torch.testing.assert_close(gradient(as_loss("k1")), torch.zeros(3, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(gradient(as_loss("k2")), gradient(lambda lp: (lp.exp() * (lp - ref.log())).sum()))
    torch.testing.assert_close(gradient(as_loss("k3")), gradient(lambda lp: (ref * (ref.log() - lp)).sum()))


@given(st.floats(-100, 100))
def test_k3_is_never_negative_and_always_finite(difference):
    value = ops.kl("k3", torch.tensor(difference, dtype=torch.float32)).item()
    assert 0 <= value < math.inf


def test_k3_keeps_its_digits_near_zero():
    d = torch.tensor(1e-4, dtype=torch.float32)
    assert ops.kl("k3", d).item() == pytest.approx(float(d) ** 2 / 2 * (1 - float(d) / 3), rel=1e-6)


def test_clip_higher():
    """w = 1.25, A = 1: an upper clip of 0.2 gives 1.2, one of 0.28 gives 1.25."""
    log_ratio = tensor([[math.log(1.25)]])
    advantages = tensor([[1.0]])
    symmetric, _, high = ops.clipped_surrogate(log_ratio, advantages, 0.2, 0.2)
    assert symmetric.item() == pytest.approx(1.2)
    assert high.all()
    higher, _, high = ops.clipped_surrogate(log_ratio, advantages, 0.2, 0.28)
    assert higher.item() == pytest.approx(1.25)
    assert not high.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient", "low", "high"),
    [
        (1.5, 1.0, 1.2, 0.0, False, True),
        (0.5, 1.0, 0.5, 0.5, False, False),
        (1.5, -1.0, -1.5, -1.5, False, False),
        (0.5, -1.0, -0.8, 0.0, True, False),
        (1.0, 2.0, 2.0, 2.0, False, False),
    ],
)
def test_each_corner_of_the_clip(ratio, advantage, objective, gradient, low, high):
    log_ratio = tensor([[math.log(ratio)]]).requires_grad_()
    value, clipped_low, clipped_high = ops.clipped_surrogate(log_ratio, tensor([[advantage]]), 0.2, 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(objective)
    assert log_ratio.grad.item() == pytest.approx(gradient)
    assert (clipped_low.item(), clipped_high.item()) == (low, high)


def test_ratios_are_bounded():
    log_ratio = torch.tensor([500.0, -500.0])
    assert ops.ratio(log_ratio).tolist() == pytest.approx([math.exp(20), math.exp(-20)])


# unbiased std of [1, 0, 0, 1] is sqrt(1/3); of [1, 0, 0, 0] it is 1/2
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 0.0, 0.0, 1.0], [0.865875, -0.865875, -0.865875, 0.865875]),
        ([1.0, 0.0, 0.0, 0.0], [1.49970, -0.499900, -0.499900, -0.499900]),
        ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_group_advantages(rewards, expected):
    assert ops.group_advantages(tensor([rewards]), "group")[0].tolist() == pytest.approx(expected, abs=5e-6)


def test_unscaled_advantages_are_leave_one_out_up_to_a_factor():
    """G / (G - 1) * (R_i - mean R) = R_i - mean of the others (RLOO)."""
    rewards = tensor([[1.0, 0.0, 0.0, 3.0]])
    others = (rewards.sum() - rewards) / 3
    torch.testing.assert_close(4 / 3 * ops.group_advantages(rewards, "none"), rewards - others)


def test_batch_scaling():
    """Rewards [[1, 0], [0, 0]]: unbiased std of all four is 1/2, group means 1/2 and 0."""
    scaled = ops.group_advantages(tensor([[1.0, 0.0], [0.0, 0.0]]), "batch")
    assert scaled.flatten().tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0, 0])
    one_group = tensor([[1.0, 0.0, 0.0, 1.0]])
    torch.testing.assert_close(ops.group_advantages(one_group, "batch"), ops.group_advantages(one_group, "group"))


def test_batch_scaling_is_that_of_all_ranks():
    rewards = tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 2.0], [1.0, 1.0]])
    ranks = rewards.split(2)

    def on_rank(rank):
        """An `all_sum` that adds what the other rank would have contributed at the same step."""
        other = ranks[1 - rank]
        mean = rewards.mean()
        terms = iter([torch.tensor(float(other.numel())), other.sum(), (other - mean).square().sum()])
        return lambda x: x + next(terms)

    split = [ops.group_advantages(ranks[rank], "batch", all_sum=on_rank(rank)) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(split), ops.group_advantages(rewards, "batch"))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_missing_reward_leaves_the_others_as_they_would_be_alone(scale):
    alone = ops.group_advantages(tensor([[1.0, 0.0, 4.0]]), scale)[0]
    beside = ops.group_advantages(tensor([[1.0, NAN, 0.0, 4.0, NAN]]), scale)[0]
    torch.testing.assert_close(beside[[0, 2, 3]], alone)
    assert beside[[1, 4]].tolist() == [0, 0]
    few = ops.group_advantages(tensor([[3.0, NAN, NAN], [NAN, NAN, NAN]]), scale)
    assert few.tolist() == [[0, 0, 0], [0, 0, 0]]


rewards_of_groups = st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=4)


@given(rewards_of_groups, st.floats(-100, 100), st.sampled_from(["group", "batch", "none"]))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards, constant, scale):
    original = ops.group_advantages(tensor(rewards), scale)
    shifted = ops.group_advantages(tensor(rewards) + constant, scale)
    torch.testing.assert_close(shifted, original, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("rewards", "scale"), [([[1.0]], "group"), ([[1.0, 0.0]], "rank")])
def test_group_advantages_refuse(rewards, scale):
    with pytest.raises(ConfigError):
        ops.group_advantages(tensor(rewards), scale)


ADVANTAGES = [0.82675, 0.765, 0.7]  # A_2 = 1 - .3; A_1 = (.3 - .2) + .95 * .7; A_0 = (.2 - .1) + .95 * .765


def test_gae_golden():
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ops.gae(tensor([[0.0, 0.0, 1.0]]), tensor([[0.1, 0.2, 0.3]]), mask, gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx(ADVANTAGES, abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.92675, 0.965, 1.0], abs=1e-12)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rewards, values = tensor([[0.5, -1.0, 2.0]]), tensor([[0.1, 0.2, 0.3]])
    advantages, _ = ops.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert advantages[0].tolist() == pytest.approx([1.5 - 0.1, 1.0 - 0.2, 2.0 - 0.3])


def test_gae_discounts_by_gamma():
    """gamma = lambda = 1/2: A_2 = 1 - .3; A_1 = .5 * .3 - .2 + .25 * .7; A_0 = .5 * .2 - .1 + .25 * .125."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = ops.gae(tensor([[0.0, 0.0, 1.0]]), tensor([[0.1, 0.2, 0.3]]), mask, gamma=0.5, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([0.03125, 0.125, 0.7], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.13125, 0.325, 1.0], abs=1e-12)


def test_gae_steps_over_masked_positions():
    """Padding behind, and a tool's tokens between, change nothing, whatever they hold."""
    rewards = tensor([[0.0, NAN, 0.0, 1.0, NAN, NAN]])
    values = tensor([[0.1, NAN, 0.2, 0.3, NAN, 9.0]])
    mask = torch.tensor([[1, 0, 1, 1, 0, 0]]).bool()
    advantages, returns = ops.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx([0.82675, 0, 0.765, 0.7, 0, 0], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.92675, 0, 0.965, 1.0, 0, 0], abs=1e-12)


def test_whiten_golden():
    values = tensor([[*ADVANTAGES, NAN]])
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    expected = [0.991343, 0.017092, -1.008436, 0.0]
    assert ops.whiten(values, mask)[0].tolist() == pytest.approx(expected, abs=1e-6)
    kept = ops.whiten(values, mask, keep_mean=True)[0, :3]
    assert (kept - sum(ADVANTAGES) / 3).tolist() == pytest.approx(expected[:3], abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("reward", [0.1, 1000.1])
def test_equal_rewards_are_no_signal(reward, scale):
    """In float32 the mean of seven times 1000.1 is off by 6e-5, and the deviation is 1e-4."""
    rewards = torch.full((1, 7), reward, dtype=torch.float32)
    assert ops.group_advantages(rewards, scale).tolist() == [[0.0] * 7]
    assert ops.whiten(rewards, torch.ones(1, 7, dtype=torch.bool)).tolist() == [[0.0] * 7]


def test_whiten_of_nothing_is_nothing():
    assert ops.whiten(tensor([[NAN, NAN]]), torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]
