"""AdamW on split weights: the float32 master is exact, rounding is unbiased and repeatable, state survives a reload."""

from __future__ import annotations

import copy

import pytest
import torch

from aligntune.errors import ConfigError
from aligntune.optim import split_adamw
from aligntune.optim.split_adamw import SplitAdamW, master, noise, round_stochastically, split


def test_a_float32_comes_back_bit_for_bit() -> None:
    values = torch.cat([torch.randn(10_000), torch.tensor([0.0, -0.0, 1e-38, -3e38, 1.00390625, -1.00390625])])
    weight, rest = split(values)
    assert torch.equal(master(weight, rest), values)
    assert (weight.float() - values).abs().max() <= values.abs().max() * 2**-8
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # halfway between two bfloat16 numbers
    assert torch.equal(master(*split(ties)), ties)
    near = values[:10_000]
    assert torch.equal(split(near)[0], near.to(torch.bfloat16))  # no ties among random numbers


def steps(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def test_equals_float32_adamw_on_the_masters() -> None:
    torch.manual_seed(0)
    start = torch.randn(40, 50).to(torch.bfloat16)
    gradients = [torch.randn(40, 50).to(torch.bfloat16) * 0.01 for _ in range(60)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    settings = {"lr": 1e-4, "betas": (0.9, 0.98), "weight_decay": 0.1}
    optimizer = SplitAdamW([ours], **settings)
    steps(optimizer, ours, gradients)
    steps(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    whole = master(ours.data, optimizer.state[ours]["rest"])
    assert torch.allclose(whole, theirs.data, rtol=1e-6, atol=1e-8)
    assert torch.equal(ours.data, theirs.data.to(torch.bfloat16))


def test_small_updates_add_up() -> None:
    """A weight of 1 in plain bfloat16 never moves by steps of 1e-4, which are less than half of its last digit."""
    ours, plain = (torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    steps(SplitAdamW([ours], lr=1e-4), ours, [torch.ones(8)] * 100)
    steps(torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0), plain, [torch.ones(8)] * 100)
    assert torch.equal(plain.data, torch.ones(8, dtype=torch.bfloat16))
    assert torch.equal(ours.data, torch.full((8,), 0.99).to(torch.bfloat16))


def test_noise_is_even_and_rounding_keeps_the_mean() -> None:
    drawn = noise(200_000, 7, torch.device("cpu")).double()
    assert drawn.min() >= 0
    assert drawn.max() < 65536
    assert drawn.mean() == pytest.approx(32767.5, rel=0.01)
    assert drawn.std() == pytest.approx(65536 / 12**0.5, rel=0.01)
    neighbours = torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]
    other = torch.corrcoef(torch.stack([drawn, noise(200_000, 8, torch.device("cpu")).double()]))[0, 1]
    assert abs(neighbours) < 0.01
    assert abs(other) < 0.01
    value = torch.full((200_000,), 1 + 0.3 * 2**-7)  # three tenths of the way to the next bfloat16
    rounded = round_stochastically(value, 3).float()
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    assert (rounded == 1 + 2**-7).double().mean() == pytest.approx(0.3, abs=0.01)


def test_a_second_moment_in_bfloat16_decays() -> None:
    """beta2 = 0.999: without stochastic rounding it would stay at its first value for ever."""
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = SplitAdamW([parameter], lr=0.0, moments=torch.bfloat16)
    steps(optimizer, parameter, [torch.ones(4096)] + [torch.zeros(4096)] * 700)
    expected = 0.001 * 0.999**700
    found = optimizer.state[parameter]["exp_avg_sq"]
    assert found.dtype == torch.bfloat16
    assert found.double().mean() == pytest.approx(expected, rel=0.02)


def test_moments_parameters_and_steps_are_rounded_by_noise_of_their_own() -> None:
    """With equal betas and gradients of 1 both moments are 0.1 before they are rounded, in every step that begins at zero."""
    one, other = (torch.nn.Parameter(torch.zeros(256, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = SplitAdamW([one, other], betas=(0.9, 0.9), moments=torch.bfloat16)
    found = []
    for _ in range(2):
        one.grad = other.grad = torch.ones(256, dtype=torch.bfloat16)
        optimizer.step()
        moments = [optimizer.state[parameter][name] for parameter in (one, other) for name in ("exp_avg", "exp_avg_sq")]
        found += [tuple(moment.tolist()) for moment in moments]
        for moment in moments:
            moment.zero_()
    assert len(set(found)) == 8


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_one_that_went_on(moments: torch.dtype) -> None:
    torch.manual_seed(1)
    gradients = [torch.randn(300) for _ in range(8)]
    start = torch.randn(300).to(torch.bfloat16)
    one = torch.nn.Parameter(start.clone())
    optimizer = SplitAdamW([one], lr=1e-3, moments=moments)
    steps(optimizer, one, gradients[:4])
    saved, weights = copy.deepcopy(optimizer.state_dict()), one.data.clone()
    steps(optimizer, one, gradients[4:])
    other = torch.nn.Parameter(weights)
    resumed = SplitAdamW([other], lr=1e-3, moments=moments)
    resumed.load_state_dict(saved)
    assert resumed.state[other]["rest"].dtype == torch.int16
    steps(resumed, other, gradients[4:])
    assert torch.equal(one.data, other.data)
    assert torch.equal(optimizer.state[one]["rest"], resumed.state[other]["rest"])


def test_parameters_of_other_formats_are_updated_as_adamw_does() -> None:
    torch.manual_seed(2)
    start, gradients = torch.randn(20, 3), [torch.randn(20, 3) for _ in range(5)]
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    steps(SplitAdamW([ours], lr=0.1), ours, gradients)
    steps(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0), theirs, gradients)
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_tensors_are_updated_together_where_they_lie_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch reads the memory of its own device alone; so does one that has another rate."""
    places = ("cpu", "meta", "cpu", "meta", "cpu")
    parameters = [torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16, device=place)) for place in places]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    launches = []
    monkeypatch.setattr(
        split_adamw,
        "split_updates",
        lambda tensors, step: launches.append((step.lr, [part.weight.device.type for part in tensors])),
    )
    SplitAdamW([{"params": parameters[:4], "lr": 0.1}, {"params": parameters[4:], "lr": 0.2}], lr=0.1).step()
    assert launches == [(0.1, ["cpu", "cpu"]), (0.1, ["meta", "meta"]), (0.2, ["cpu"])]


def test_a_weight_that_cannot_be_counted_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.empty(2**31, dtype=torch.bfloat16, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    with pytest.raises(ConfigError, match="one has 2,147,483,648: use another optimizer"):
        SplitAdamW([parameter]).step()
