"""PPO, GRPO, DAPO, Dr. GRPO, GSPO and Neural Mirror GRPO: golden numbers, gradients and invariances."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from aligntune import algorithms
from aligntune.algorithms import Normalizers, RolloutBatch, ScoredRollouts, combine_metrics, dapo, gspo, neural_mirror
from aligntune.algorithms.mirror_map import MirrorMap
from aligntune.errors import ConfigError
from tiny import settings_of

CONFIGS = {
    "ppo": settings_of("ppo"),
    "grpo": settings_of("grpo", grpo_alpha=0.05),
    "dapo": settings_of("dapo"),
    "dr_grpo": settings_of("dr_grpo"),
    "gspo": settings_of("gspo", gspo_gamma=0.02, gspo_delta=0.03),
    "neural_mirror_grpo": settings_of("neural_mirror_grpo", mirror_coefficient=0.5, kl_coef=0.1),
}
LIMIT = 8


def loss_of(name, batch, normalizers=None, config=None):
    return algorithms.get(name).loss(batch, config or CONFIGS[name], normalizers or batch.normalizers(LIMIT))


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def single(ratios, advantage, **fields_) -> RolloutBatch:
    """One sequence with these token ratios."""
    log_probs = tensor([ratios]).log() - 1
    return RolloutBatch(
        log_probs=log_probs.requires_grad_(),
        old_log_probs=torch.full_like(log_probs, -1.0),
        completion_mask=torch.ones_like(log_probs),
        advantages=tensor([advantage]),
        **fields_,
    )


def rows(batch: RolloutBatch, part: slice) -> RolloutBatch:
    return RolloutBatch(**{f.name: getattr(batch, f.name)[part] for f in fields(batch)})


def gradients(loss, batch):
    leaves = [batch.log_probs, batch.values, batch.entropy]
    return torch.autograd.grad(loss.value, leaves, allow_unused=True, materialize_grads=True)


# ---- golden numbers -------------------------------------------------------------------------------------------------


def test_grpo_by_hand():
    """Two rows. Row 1: one token, w = 1, A = 2. Row 2: tokens w = 1.5 (clipped at 1.2) and 0.5, A = 1. k3 with d = 0.5."""
    log_probs = tensor([[-1.0, 0.0], [math.log(1.5) - 1, math.log(0.5) - 1]])
    batch = RolloutBatch(
        log_probs=log_probs,
        old_log_probs=torch.full((2, 2), -1.0, dtype=torch.float64),
        completion_mask=tensor([[1, 0], [1, 1]]),
        advantages=tensor([2.0, 1.0]),
        ref_log_probs=log_probs - 0.5,
    )
    k3 = math.exp(-0.5) - 0.5
    result = loss_of("grpo", batch, config=settings_of("grpo", kl_coef=0.1))
    assert result.value.item() == pytest.approx(-(2 + (1.2 + 0.5) / 2) / 2 + 0.1 * k3)
    metrics = {name: value.item() for name, value in result.metrics.items()}
    assert metrics["loss"] == pytest.approx(result.value.item())
    assert metrics["loss/policy"] == pytest.approx(-1.425)
    assert metrics["kl"] == pytest.approx(k3)
    assert metrics["clip_fraction_high"] == pytest.approx(1 / 3)
    assert metrics["clip_fraction_low"] == 0
    assert metrics["ratio_mean"] == pytest.approx((1 + 1.5 + 0.5) / 3)
    assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((0.5, 1.5))
    assert metrics["approx_kl"] == pytest.approx((0 + 0.5 - math.log(1.5) - 0.5 - math.log(0.5)) / 3)


@pytest.mark.parametrize(("name", "expected"), [("grpo", 0.0), ("dapo", 0.5), ("dr_grpo", 0.25), ("gspo", 0.0)])
def test_each_algorithm_averages_in_its_own_way(name, expected):
    """Rows of 1 and 3 tokens, advantages +1 and -1, ratio 1, limit 4: token losses -1 | 1 1 1."""
    log_probs = torch.full((2, 3), -1.0, dtype=torch.float64)
    mask = tensor([[1, 0, 0], [1, 1, 1]])
    batch = RolloutBatch(log_probs, log_probs.clone(), mask, tensor([1.0, -1.0]))
    config = type(CONFIGS[name])(kl_coef=0.0)
    assert loss_of(name, batch, batch.normalizers(4), config).value.item() == pytest.approx(expected, abs=1e-15)


def test_loss_type_chooses_the_average():
    log_probs = torch.full((2, 3), -1.0, dtype=torch.float64)
    batch = RolloutBatch(log_probs, log_probs.clone(), tensor([[1, 0, 0], [1, 1, 1]]), tensor([1.0, -1.0]))
    for loss_type, expected in (("grpo", 0.0), ("dapo", 0.5), ("dr_grpo", 0.25)):
        config = settings_of("grpo", kl_coef=0.0, loss_type=loss_type)
        assert loss_of("grpo", batch, batch.normalizers(4), config).value.item() == pytest.approx(expected, abs=1e-15)


def test_dapo_clips_higher():
    """w = 1.25, A = 1: clipped at 1.2 by GRPO, not at 1.28 by DAPO, whose upper side `cliprange_high` can move."""
    assert loss_of("grpo", single([1.25], 1.0), config=settings_of("grpo", kl_coef=0.0)).value.item() == pytest.approx(
        -1.2
    )
    assert loss_of("dapo", single([1.25], 1.0), config=settings_of("dapo", kl_coef=0.0)).value.item() == pytest.approx(
        -1.25
    )
    config = settings_of("dapo", kl_coef=0.0, cliprange_high=0.1)
    assert loss_of("dapo", single([1.25], 1.0), config=config).value.item() == pytest.approx(-1.1)
    config = settings_of("grpo", kl_coef=0.0, cliprange_high=0.24)
    assert loss_of("grpo", single([1.25], 1.0), config=config).value.item() == pytest.approx(-1.24)


def test_gspo_golden():
    """Ratios 1.2, 1.0, 0.9: geometric mean 1.0259856. Clip 3e-4 / 4e-4."""
    config = settings_of("gspo", kl_coef=0.0, gspo_gamma=3e-4, gspo_delta=4e-4)
    s = (1.2 * 1.0 * 0.9) ** (1 / 3)
    assert s == pytest.approx(1.0259856, abs=5e-8)

    batch = single([1.2, 1.0, 0.9], 1.0)
    result = loss_of("gspo", batch, config=config)
    result.value.backward()
    assert result.value.item() == pytest.approx(-1.0004)
    assert batch.log_probs.grad.tolist() == [[0.0, 0.0, 0.0]]
    assert result.metrics["clip_fraction_high"].item() == 1

    batch = single([1.2, 1.0, 0.9], -1.0)
    result = loss_of("gspo", batch, config=config)
    result.value.backward()
    assert result.value.item() == pytest.approx(s)
    assert batch.log_probs.grad[0].tolist() == pytest.approx([s / 3] * 3)


def test_gspo_clip_range_falls_back_to_cliprange():
    assert gspo.sequence_clip(settings_of("gspo", cliprange=0.3)) == (0.3, 0.3)
    assert gspo.sequence_clip(settings_of("gspo", cliprange=0.3, cliprange_high=0.4)) == (0.3, 0.4)
    assert gspo.sequence_clip(settings_of("gspo", cliprange=0.3, gspo_gamma=3e-4)) == (3e-4, 0.3)
    assert gspo.sequence_clip(settings_of("gspo", cliprange=0.3, gspo_delta=4e-4)) == (0.3, 4e-4)


def test_ppo_by_hand():
    """One row: w = 1.5 and A = 1 (clipped at 1.2); V = 1, R = 2, V_old = 0.5, clip 0.2: V is clipped to 0.7, error 1.69."""
    batch = single([1.5], 1.0, values=tensor([[1.0]]), old_values=tensor([[0.5]]), returns=tensor([[2.0]]))
    result = loss_of("ppo", batch)
    assert result.value.item() == pytest.approx(-1.2 + 0.1 * 0.5 * 1.69)
    assert result.metrics["loss/value"].item() == pytest.approx(0.1 * 0.5 * 1.69)
    assert result.metrics["clip_fraction_value"].item() == 1


def test_entropy_bonus_only_when_given():
    batch = single([1.0, 1.0], 0.0, entropy=tensor([[0.5, 1.5]]).requires_grad_())
    assert loss_of("grpo", batch, config=settings_of("grpo", kl_coef=0.0)).value.item() == 0
    result = loss_of("grpo", batch, config=settings_of("grpo", kl_coef=0.0, grpo_alpha=0.1))
    assert result.value.item() == pytest.approx(-0.1 * 1.0)
    assert torch.autograd.grad(result.value, batch.entropy)[0].tolist() == [[-0.05, -0.05]]
    with pytest.raises(ValueError, match="entropy"):
        loss_of("grpo", single([1.0], 0.0), config=settings_of("grpo", kl_coef=0.0, grpo_alpha=0.1))


@pytest.mark.parametrize(("estimator", "expected"), [(None, math.exp(-0.5) - 0.5), ("k1", 0.5), ("k2", 0.125)])
def test_kl_estimator_of_the_loss(estimator, expected):
    batch = single([1.0], 0.0)
    batch.ref_log_probs = batch.log_probs.detach() - 0.5
    config = settings_of("grpo", kl_coef=2.0, **({"kl_estimator": estimator} if estimator else {}))
    assert loss_of("grpo", batch, config=config).value.item() == pytest.approx(2 * expected)


def test_mirror_term_by_hand():
    """p = 0.6, q = 0.5: D of prob_l2 is 0.01, of log_l2 0.0332412, of KL 0.6 log 1.2 - 0.1."""
    log_p = tensor([[math.log(0.6)]])
    batch = RolloutBatch(log_p, log_p.clone(), torch.ones(1, 1), tensor([0.0]), ref_log_probs=tensor([[math.log(0.5)]]))
    for name, expected in (("prob_l2", 0.01), ("log_l2", 0.0332412), ("kl", 0.6 * math.log(1.2) - 0.1)):
        config = settings_of("neural_mirror_grpo", mirror_map=name, mirror_coefficient=3.0)
        result = loss_of("neural_mirror_grpo", batch, config=config)
        assert result.value.item() == pytest.approx(3 * expected, abs=2e-7)
        assert result.metrics["mirror_divergence"].item() == pytest.approx(expected, abs=1e-7)
    config = settings_of("neural_mirror_grpo", mirror_coefficient=3.0, kl_coef=2.0, mirror_map="prob_l2")
    k3 = 0.5 / 0.6 - 1 + math.log(0.6 / 0.5)
    assert loss_of("neural_mirror_grpo", batch, config=config).value.item() == pytest.approx(0.03 + 2 * k3)


def test_the_mirror_map_comes_from_seed_or_file_or_memory(tmp_path):
    batch = single([1.0], 0.0)
    batch.ref_log_probs = batch.log_probs.detach() - 0.5
    config = settings_of("neural_mirror_grpo", mirror_coefficient=1.0, mirror_seed=3)
    expected = MirrorMap.random(3).divergence(batch.log_probs, batch.ref_log_probs).item()
    assert loss_of("neural_mirror_grpo", batch, config=config).value.item() == pytest.approx(expected)
    MirrorMap.random(4).save(tmp_path / "map.json")
    other = MirrorMap.random(4).divergence(batch.log_probs, batch.ref_log_probs).item()
    from_file = settings_of("neural_mirror_grpo", mirror_coefficient=1.0, mirror_path=str(tmp_path / "map.json"))
    assert loss_of("neural_mirror_grpo", batch, config=from_file).value.item() == pytest.approx(other)
    in_memory = neural_mirror.loss(batch, config, batch.normalizers(), distance=MirrorMap.random(4).divergence)
    assert in_memory.value.item() == pytest.approx(other)
    assert other != pytest.approx(expected, rel=1e-3)


# ---- gradients and invariances --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_against_finite_differences(name, rollouts):
    """Clips are wide, because a finite difference across a kink means nothing."""
    batch = rollouts(rows=3, tokens=3, seed=4, spread=0.05)
    config = CONFIGS[name].model_copy(
        update={"cliprange": 0.9, "cliprange_value": 9.0, "gspo_gamma": 0.9, "gspo_delta": 0.9}
    )

    def value(log_probs, values, entropy):
        changed = replace(batch, log_probs=log_probs, values=values, entropy=entropy)
        return loss_of(name, changed, config=config).value

    assert torch.autograd.gradcheck(value, (batch.log_probs, batch.values, batch.entropy), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
@examples(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), max_size=4, unique=True), seed=st.integers(0, 1000))
def test_cutting_the_batch_changes_nothing(name, rollouts, cuts, seed):
    batch = rollouts(seed=seed)
    whole = loss_of(name, batch)
    bounds = [0, *sorted(cuts), 6]
    parts = [rows(batch, slice(a, b)) for a, b in pairwise(bounds)]
    normalizers = parts[0].normalizers(LIMIT)
    for part in parts[1:]:
        normalizers = normalizers + part.normalizers(LIMIT)
    shares = [loss_of(name, part, normalizers) for part in parts]
    assert sum(share.value for share in shares).item() == pytest.approx(whole.value.item(), abs=1e-12)
    combined = combine_metrics(share.metrics for share in shares)
    assert combined.keys() == whole.metrics.keys()
    for metric, value in whole.metrics.items():
        assert combined[metric].item() == pytest.approx(value.item(), abs=1e-12), metric
    total = algorithms.Loss(sum(share.value for share in shares))
    for ours, theirs in zip(gradients(total, batch), gradients(whole, batch)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", CONFIGS)
def test_growing_the_padding_changes_nothing(name, garbage, rollouts):
    batch = rollouts()
    grown = {}
    for f in fields(batch):
        x = getattr(batch, f.name).detach()
        padding = False if x.dtype == torch.bool else garbage
        grown[f.name] = x if x.dim() == 1 else torch.nn.functional.pad(x, (0, 3), value=padding)
    for name_ in ("log_probs", "values", "entropy"):
        grown[name_].requires_grad_()
    larger = RolloutBatch(**grown)
    whole, other = loss_of(name, batch), loss_of(name, larger)
    assert other.value.item() == pytest.approx(whole.value.item(), abs=1e-12)
    for metric, value in whole.metrics.items():
        assert other.metrics[metric].item() == pytest.approx(value.item(), abs=1e-12), metric
    for ours, theirs in zip(gradients(other, larger), gradients(whole, batch)):
        torch.testing.assert_close(ours[:, :5], theirs)
        assert (ours[:, 5:] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_tokens_costs_nothing(name, rollouts):
    batch = rollouts()
    batch.completion_mask = torch.zeros_like(batch.completion_mask)
    result = loss_of(name, batch)
    assert result.value.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(result, batch))
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert result.metrics["ratio_min"].item() == result.metrics["ratio_max"].item() == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_update_is_on_policy(name, rollouts):
    """old = current: ratio exactly 1, nothing clipped, and the policy gradient is -A times the reduction's weight."""
    batch = rollouts()
    batch.old_log_probs = batch.log_probs.detach().clone()
    config = CONFIGS[name].model_copy(
        update={"kl_coef": 0.0, "vf_coef": 0.0, "mirror_coefficient": 0.0, "grpo_alpha": 0.0}
    )
    result = loss_of(name, batch, config=config)
    for metric, expected in (("ratio_min", 1), ("ratio_max", 1), ("clip_fraction_low", 0), ("clip_fraction_high", 0),
                             ("approx_kl", 0)):  # fmt: skip
        assert result.metrics[metric].item() == expected
    mask, counts = batch.completion_mask, batch.completion_mask.sum(1, keepdim=True)
    weights = {"ppo": 1 / counts.sum(), "dapo": 1 / counts.sum(), "dr_grpo": tensor(1 / (6 * LIMIT))}
    expected = -batch.advantages.unsqueeze(1) * mask * weights.get(name, 1 / (6 * counts))
    torch.testing.assert_close(gradients(result, batch)[0], expected)


@examples(max_examples=20, deadline=None)
@given(st.floats(-1, 1), st.floats(-2, 2))
def test_gspo_of_one_token_is_grpo(log_ratio, advantage):
    batches = [single([math.exp(log_ratio)], advantage) for _ in range(2)]
    ours = loss_of("gspo", batches[0], config=settings_of("gspo", kl_coef=0.0))
    theirs = loss_of("grpo", batches[1], config=settings_of("grpo", kl_coef=0.0))
    assert ours.value.item() == pytest.approx(theirs.value.item(), abs=1e-14)
    for result, batch in ((ours, batches[0]), (theirs, batches[1])):
        result.value.backward()
        assert batch.log_probs.grad is not None
    torch.testing.assert_close(batches[0].log_probs.grad, batches[1].log_probs.grad)


def test_dr_grpo_gives_a_row_the_same_gradient_beside_any_other(rollouts):
    config = settings_of("dr_grpo", kl_coef=0.0)
    short, long = rollouts(rows=2, tokens=3, seed=1), rollouts(rows=2, tokens=3, seed=2)
    both = RolloutBatch(*(torch.cat([getattr(short, name), getattr(long, name)]) for name in
                          ("log_probs", "old_log_probs", "completion_mask", "advantages")))  # fmt: skip
    normalizers = Normalizers(4, 99, LIMIT)
    alone = torch.autograd.grad(loss_of("dr_grpo", short, normalizers, config).value, short.log_probs)[0]
    beside = torch.autograd.grad(loss_of("dr_grpo", both, normalizers, config).value, short.log_probs)[0]
    torch.testing.assert_close(alone, beside)


def test_the_mismatch_of_the_sampler_is_measured():
    """log pi_old = -1; the sampler said -1.5 and -0.75: mean |d| = 0.375, k3 of the sampler against us = e^d - 1 - d."""
    batch = single([1.0, 1.0], 1.0, sampler_log_probs=tensor([[-1.5, -0.75]]))
    metrics = loss_of("grpo", batch, config=settings_of("grpo", kl_coef=0.0)).metrics
    assert metrics["sampler_mismatch"].item() == pytest.approx(0.375)
    k3 = ((math.exp(0.5) - 1 - 0.5) + (math.exp(-0.25) - 1 + 0.25)) / 2
    assert metrics["sampler_kl"].item() == pytest.approx(k3)


def test_an_outlier_token_gives_a_finite_loss():
    batch = single([1.0], -1.0)
    batch = replace(batch, log_probs=torch.tensor([[0.0]], requires_grad=True), old_log_probs=torch.tensor([[-500.0]]))
    result = loss_of("grpo", batch, config=settings_of("grpo", kl_coef=0.0))
    assert result.value.item() == pytest.approx(math.exp(20), rel=1e-6)


def test_half_precision_and_wrong_shapes_are_refused():
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        RolloutBatch(half, half, torch.ones(2, 3), torch.zeros(2))
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="advantages"):
        RolloutBatch(good, good, torch.ones(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="old_log_probs"):
        RolloutBatch(good, torch.zeros(2, 4), torch.ones(2, 3), torch.zeros(2))


def test_a_missing_reference_is_an_error():
    with pytest.raises(ValueError, match="ref_log_probs"):
        loss_of("grpo", single([1.0], 1.0), config=settings_of("grpo"))


# ---- advantages and hooks -------------------------------------------------------------------------------------------


def scored(rewards, lengths=None, **fields_) -> ScoredRollouts:
    rewards = tensor(rewards)
    lengths = torch.ones_like(rewards) if lengths is None else torch.tensor(lengths)
    width = int(lengths.max())
    mask = torch.arange(width) < lengths.flatten().unsqueeze(1)
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    defaults = {"ended": torch.ones(len(mask)), "old_log_probs": zeros}
    return ScoredRollouts(rewards=rewards, completion_mask=mask, **(defaults | fields_))


def test_advantages_of_the_family():
    rollouts = scored([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    result = algorithms.get("grpo").compute_advantages(rollouts, settings_of("grpo"))
    assert result.advantages.tolist() == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875, 0, 0, 0, 0], abs=5e-6)
    assert result.metrics["zero_variance_groups"].item() == 0.5
    assert result.metrics["group_reward_std"].item() == pytest.approx(math.sqrt(1 / 3) / 2)
    plain = algorithms.get("dr_grpo").compute_advantages(rollouts, settings_of("dr_grpo"))
    assert plain.advantages.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    scaled = algorithms.get("dr_grpo").compute_advantages(rollouts, settings_of("dr_grpo", scale_rewards="group"))
    torch.testing.assert_close(scaled.advantages, result.advantages)


def test_overlong_punishment_golden():
    lengths = torch.tensor([100, 16384, 18432, 20480, 20481])
    assert dapo.overlong_punishment(lengths, 20480, 4096, 1.0).tolist() == [0, 0, -0.5, -1, -1]
    assert dapo.overlong_punishment(lengths, 20480, 4096, 0.5).tolist() == [0, 0, -0.25, -0.5, -0.5]


def test_the_punishment_enters_before_the_groups_are_compared():
    """Limit 8, buffer 4: lengths 4, 6 and 8 lose 0, 1/2 and 1. Rewards become 1, 1/2, 0; their unbiased std is 1/2."""
    rollouts = scored([[1.0, 1.0, 1.0]], [[4, 6, 8]])
    config = settings_of("dapo", max_completion_length=8, overlong_buffer=4)
    result = algorithms.get("dapo").compute_advantages(rollouts, config)
    assert result.advantages.tolist() == pytest.approx([0.5 / 0.5001, 0, -0.5 / 0.5001])
    assert result.metrics["overlong_punishment"].item() == pytest.approx(-0.5)
    off = algorithms.get("dapo").compute_advantages(rollouts, settings_of("dapo", max_completion_length=8))
    assert off.advantages.tolist() == [0, 0, 0]
    assert "overlong_punishment" not in off.metrics


def test_a_completion_without_a_reward_takes_no_part_in_the_punishment():
    """The others' rewards, 0 and 1, become -1/2 and 1/2; their unbiased std is 1/sqrt(2)."""
    rollouts = scored([[0.0, 1.0, math.nan]], [[6, 6, 0]])
    config = settings_of("dapo", max_completion_length=8, overlong_buffer=4)
    result = algorithms.get("dapo").compute_advantages(rollouts, config)
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert result.advantages.tolist() == pytest.approx([-half, half, 0])
    assert result.metrics["overlong_punishment"].item() == pytest.approx(-0.5)
    assert result.metrics["group_reward_std"].item() == pytest.approx(math.sqrt(0.5))


def test_dynamic_sampling_keeps_groups_with_a_signal():
    rewards = tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.3]])
    spec = algorithms.get("dapo")
    assert spec.keep_groups(rewards, settings_of("dapo")).tolist() == [True, False, False, True]
    assert spec.keep_groups(rewards, settings_of("dapo", dynamic_sampling=False)).all()
    assert algorithms.get("grpo").keep_groups(rewards, settings_of("grpo")).all()


def test_ppo_token_rewards_and_advantages_by_hand():
    """Row 1, two tokens, ended, score 1, d = 0.5 each: r = [-0.05, 0.95]. Row 2, one token, truncated: r = 2 - 1 - 0.05.
    V = 0 and gamma = lam = 1: advantages are the rewards to go [0.9, 0.95 | 0.95], then whitened."""
    log_probs = torch.full((2, 2), -1.0, dtype=torch.float64)
    rollouts = scored(
        [[1.0], [2.0]], [[2], [1]], ended=torch.tensor([1, 0]), old_log_probs=log_probs, ref_log_probs=log_probs - 0.5,
        values=torch.zeros(2, 2, dtype=torch.float64),
    )  # fmt: skip
    result = algorithms.get("ppo").compute_advantages(rollouts, settings_of("ppo", kl_coef=0.1, lam=1.0))
    assert result.returns.tolist() == [pytest.approx([0.9, 0.95]), pytest.approx([0.95, 0.0])]
    mean, deviation = 2.8 / 3, math.sqrt(((1 / 30) ** 2 + 2 * (1 / 60) ** 2) / 2)
    expected = [(0.9 - mean) / deviation, (0.95 - mean) / deviation]
    assert result.advantages[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert result.advantages[1].tolist() == [pytest.approx(expected[1], abs=1e-4), 0]
    assert result.metrics["kl"].item() == pytest.approx(0.5)
    assert result.metrics["missing_eos"].item() == 0.5
    assert result.metrics["return_mean"].item() == pytest.approx(2.8 / 3)


def test_ppo_whitens_rewards_when_asked_to():
    """Token rewards [0, 1] have mean 1/2 and unbiased variance 1/2: whitened without shifting they are 1/2 -+ 1/sqrt(2)."""
    rollouts = scored([[1.0]], [[2]], values=torch.zeros(1, 2, dtype=torch.float64))
    config = settings_of("ppo", kl_coef=0.0, whiten_rewards=True, lam=1.0)
    returns = algorithms.get("ppo").compute_advantages(rollouts, config).returns
    assert returns[0].tolist() == pytest.approx([1.0, 0.5 + math.sqrt(0.5)], abs=1e-6)


def test_ppo_discounts_by_gamma_and_smooths_by_lambda():
    """r = [0, 1], V = [.1, .2]: A_1 = .8, A_0 = gamma * .2 - .1 + gamma * lam * .8 = .32 for gamma 1/2 and lambda .8."""
    rollouts = scored([[1.0]], [[2]], values=tensor([[0.1, 0.2]]))
    config = settings_of("ppo", kl_coef=0.0, gamma=0.5, lam=0.8)
    assert algorithms.get("ppo").compute_advantages(rollouts, config).returns[0].tolist() == pytest.approx([0.42, 1.0])


def test_ppo_with_an_empty_completion_and_without_reference():
    rollouts = scored([[1.0], [5.0]], [[2], [0]], values=torch.zeros(2, 2, dtype=torch.float64))
    result = algorithms.get("ppo").compute_advantages(rollouts, settings_of("ppo", kl_coef=0.0))
    assert result.returns[1].tolist() == [0, 0]
    assert torch.isfinite(result.advantages).all()
    with pytest.raises(ValueError, match="ref_log_probs"):
        algorithms.get("ppo").compute_advantages(rollouts, settings_of("ppo"))


def test_what_each_algorithm_needs():
    needs = {name: algorithms.get(name).needs(config) for name, config in CONFIGS.items()}
    assert all(need.rewards and need.reference for need in needs.values())
    assert [name for name, need in needs.items() if need.values] == ["ppo"]
    assert [name for name, need in needs.items() if need.entropy] == ["grpo"]
    assert not algorithms.get("grpo").needs(settings_of("grpo", kl_coef=0.0)).reference
    assert (
        not algorithms.get("neural_mirror_grpo")
        .needs(settings_of("neural_mirror_grpo", mirror_coefficient=0.0))
        .reference
    )
    assert algorithms.get("neural_mirror_grpo").needs(settings_of("neural_mirror_grpo")).reference
    assert [algorithms.get(name).group_relative for name in ("ppo", "grpo")] == [False, True]


@pytest.mark.parametrize(
    ("name", "config", "word"),
    [
        ("gspo", settings_of("gspo"), "3e-4"),
        ("gspo", settings_of("gspo", gspo_gamma=3e-4, gspo_delta=4e-4), None),
        ("dr_grpo", settings_of("dr_grpo", scale_rewards="group"), "scale_rewards"),
        ("dr_grpo", settings_of("dr_grpo", scale_rewards="none"), None),
        ("grpo", settings_of("grpo", kl_estimator="k1"), "k1"),
        ("grpo", settings_of("grpo"), None),
    ],
)
def test_advice(name, config, word):
    messages = algorithms.get(name).advice(config)
    assert (word is None and not messages) or word in messages[0]


def test_an_unreadable_mirror_map_is_found_before_training(tmp_path):
    config = settings_of("neural_mirror_grpo", mirror_path=str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match="absent"):
        algorithms.get("neural_mirror_grpo").check(config)


# ---- registry -------------------------------------------------------------------------------------------------------


def test_names_are_matched_loosely_and_unknown_ones_listed():
    assert algorithms.get("DR-GRPO") is algorithms.get("dr_grpo")
    with pytest.raises(ConfigError, match="dapo, dpo, dr_grpo, grpo, gspo, neural_mirror_grpo, ppo"):
        algorithms.get("reinforce")


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match="registered already"):
        algorithms.register(algorithms.get("grpo"))
