"""Evolution strategies: goldens, invariances, failures, resuming, and a bowl in 50 dimensions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.algorithms import evolution as es
from aligntune.config.algorithms import MetaESConfig
from aligntune.errors import ConfigError, RewardError

DIM = 5
SLOPE = torch.arange(1.0, DIM + 1, dtype=torch.float64)


def fresh(config, dim=DIM) -> es.EvolutionState:
    return es.start(torch.zeros(dim, dtype=torch.float64), config)


def measure(state, config, fitness) -> list[float]:
    return [fitness(candidate.parameters) for candidate in es.candidates(state, config)]


def test_centred_ranks_golden():
    ranks = es.shape(torch.tensor([3.0, 1.0, 2.0, 10.0], dtype=torch.float64), "rank").tolist()
    assert ranks == pytest.approx([1 / 6, -1 / 2, -1 / 6, 1 / 2])


def test_equal_fitness_shares_its_rank():
    assert es.shape(torch.tensor([5.0, 5.0, 1.0]), "rank").tolist() == pytest.approx([0.25, 0.25, -0.5])


def test_z_scores():
    """[1, 3]: mean 2, standard deviation 1."""
    assert es.shape(torch.tensor([1.0, 3.0], dtype=torch.float64), "zscore").tolist() == pytest.approx([-1, 1])


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8))
def test_ranks_ignore_increasing_transforms(values):
    fitness = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(es.shape(fitness, "rank"), es.shape(fitness.div(10).exp() * 3 - 1, "rank"))


def test_candidates_come_in_pairs_around_the_centre():
    config = MetaESConfig(N=6, sigma=0.5)
    state = fresh(config)
    candidates = es.candidates(state, config)
    assert [(c.index, c.pair, c.sign) for c in candidates] == [
        (0, 0, 1), (1, 0, -1), (2, 1, 1), (3, 1, -1), (4, 2, 1), (5, 2, -1)
    ]  # fmt: skip
    for plus, minus in zip(candidates[::2], candidates[1::2]):
        torch.testing.assert_close(plus.parameters + minus.parameters, 2 * state.center)
        assert not torch.equal(plus.parameters, minus.parameters)
    assert not torch.equal(candidates[0].parameters, candidates[2].parameters)


@pytest.mark.parametrize("shaping", ["rank", "zscore", "none"])
def test_constant_fitness_is_exactly_no_update(shaping):
    config = MetaESConfig(N=10, shaping=shaping)
    state = fresh(config)
    assert torch.equal(es.update(state, config, [0.1] * 10).center, state.center)


@pytest.mark.parametrize("offset", [0.0, 100.0, -7.5])
def test_a_linear_fitness_gives_the_projected_gradient_whatever_its_offset(offset):
    """F = g x + c: the estimate is (2 / N) sum_j eps_j eps_j^T g, and c cancels within each pair."""
    config = MetaESConfig(N=10, sigma=0.01, alpha=1.0, shaping="none")
    state = fresh(config)
    values = measure(state, config, lambda x: float(SLOPE @ x) + offset)
    estimate = es.update(state, config, values).center - state.center
    eps = torch.stack([(c.parameters - state.center) / 0.01 for c in es.candidates(state, config)[::2]])
    expected = (eps.T @ (eps @ SLOPE)) / 5
    assert (estimate - expected).norm().item() < 1e-6 * expected.norm().item()


def test_step_by_hand():
    """Two candidates with ranks +-1/2: theta moves by alpha * (1/2 + 1/2) * eps / 2."""
    config = MetaESConfig(N=2, sigma=0.1, alpha=0.5)
    state = fresh(config)
    eps = (es.candidates(state, config)[0].parameters - state.center) / 0.1
    moved = es.update(state, config, [2.0, 1.0])
    torch.testing.assert_close(moved.center - state.center, 0.5 * eps / 2)
    assert moved.generation == 1
    # with raw fitness: alpha * (2 - 1) * eps / (2 sigma)
    raw = MetaESConfig(N=2, sigma=0.1, alpha=0.5, shaping="none")
    torch.testing.assert_close(es.update(state, raw, [2.0, 1.0]).center - state.center, 0.5 * eps / 0.2)


def test_sigma_decays():
    config = MetaESConfig(sigma=0.1, sigma_decay=0.5)
    state = fresh(config)
    assert es.sigma(state, config) == 0.1
    state = es.update(es.update(state, config, [0.0] * 10), config, [0.0] * 10)
    assert es.sigma(state, config) == pytest.approx(0.025)


@pytest.mark.parametrize("failure", [None, math.nan, math.inf])
def test_a_failed_candidate_drops_its_pair(failure):
    """What is left is the update of the other pairs alone; equal fitness still moves nothing."""
    config = MetaESConfig(N=6, alpha=1.0, shaping="none", sigma=1.0)
    state = fresh(config)
    moved = es.update(state, config, [3.0, 1.0, failure, 5.0, 2.0, 2.0])
    eps = es.candidates(state, config)[0].parameters - state.center
    torch.testing.assert_close(moved.center - state.center, 2.0 * eps / 4)
    unmoved = es.update(state, config, [1.0, 1.0, failure, 1.0, 1.0, 1.0])
    assert torch.equal(unmoved.center, state.center)


def test_when_every_pair_fails_there_is_an_error():
    config = MetaESConfig(N=4)
    with pytest.raises(RewardError, match="every candidate pair"):
        es.update(fresh(config), config, [None, 1.0, 2.0, math.nan])


def test_odd_populations_are_refused():
    config = MetaESConfig(N=4).model_copy(update={"N": 5})
    with pytest.raises(ConfigError, match="even"):
        es.candidates(fresh(config), config)
    with pytest.raises(ValueError, match="3 fitness values for 4"):
        es.update(fresh(MetaESConfig(N=4)), MetaESConfig(N=4), [1.0] * 3)


def test_the_best_centre_is_kept_and_patience_runs_out():
    config = MetaESConfig(N=2, patience=2, min_delta=0.1, meta_iterations=100)
    first = es.observe(fresh(config), config, 0.5)
    second = es.observe(es.update(first, config, [1.0, 0.0]), config, 0.55)  # better, but not by 0.1
    assert (second.best_fitness, second.stale) == (0.55, 1)
    assert torch.equal(second.best, second.center)
    assert not es.finished(second, config)
    third = es.observe(es.update(second, config, [1.0, 0.0]), config, 0.61)  # 0.11 above the bar of 0.5
    assert (third.stale, third.bar) == (0, 0.61)
    worse = es.observe(es.update(third, config, [1.0, 0.0]), config, 0.2)
    failed = es.observe(es.update(worse, config, [1.0, 0.0]), config, None)
    assert failed.stale == 2
    assert es.finished(failed, config)
    assert torch.equal(failed.best, third.center)
    assert failed.best_fitness == 0.61


def test_a_fitness_that_stands_still_is_no_improvement():
    """Not with `min_delta` 0 either; and the first centre begins with all of its patience."""
    config = MetaESConfig(N=2, patience=1, min_delta=0.0, meta_iterations=100)
    state = fresh(config)
    assert (state.stale, es.finished(state, config)) == (0, False)
    state = es.observe(es.observe(state, config, 0.5), config, 0.5)
    assert (state.stale, es.finished(state, config)) == (1, True)


def test_generations_run_out():
    config = MetaESConfig(N=2, meta_iterations=1)
    state = fresh(config)
    assert not es.finished(state, config)
    assert es.finished(es.update(state, config, [1.0, 0.0]), config)


def test_seeds():
    config = MetaESConfig(N=2)
    state = fresh(config)
    later = es.update(state, config, [0.0, 0.0])
    assert es.training_seed(state, config) == es.training_seed(state, config)
    seeds = {es.training_seed(s, c) for s in (state, later) for c in (config, MetaESConfig(N=2, seed=1))}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_start_scatters_by_init_scale():
    wide = es.start(torch.ones(10_000, dtype=torch.float64), MetaESConfig(init_scale=0.5)).center
    assert wide.mean().item() == pytest.approx(1, abs=0.02)
    assert wide.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.equal(es.start([1.0, 2.0], MetaESConfig(init_scale=0.0)).center, torch.tensor([1.0, 2.0]).double())


def noisy_bowl(x):
    return -float(x.square().sum()) + math.sin(1e3 * float(x.sum()))


def run(state, config, generations):
    for _ in range(generations):
        state = es.observe(state, config, noisy_bowl(state.center))
        state = es.update(state, config, measure(state, config, noisy_bowl))
    return state


@pytest.mark.parametrize("shaping", ["rank", "zscore", "none"])
def test_a_resumed_run_is_the_same_to_the_bit(shaping):
    config = MetaESConfig(N=6, sigma=0.1, alpha=0.1, shaping=shaping)
    whole = run(fresh(config), config, 6)
    half = json.loads(json.dumps(run(fresh(config), config, 3).to_dict(config)))
    resumed = run(es.EvolutionState.from_dict(half, config, DIM), config, 3)
    assert torch.equal(resumed.center, whole.center)
    assert torch.equal(resumed.best, whole.best)
    assert resumed.to_dict(config) == whole.to_dict(config)


def test_a_state_of_another_config_is_refused():
    config = MetaESConfig(N=6)
    saved = fresh(config).to_dict(config)
    with pytest.raises(ConfigError, match=r"sigma \(saved 0.01, now 0.2\)"):
        es.EvolutionState.from_dict(saved, MetaESConfig(N=6, sigma=0.2), DIM)
    with pytest.raises(ConfigError, match="number of evolved parameters"):
        es.EvolutionState.from_dict(saved, config, DIM + 1)
    longer = es.EvolutionState.from_dict(saved, MetaESConfig(N=6, meta_iterations=99), DIM)
    assert longer.generation == 0


@pytest.mark.parametrize(("shaping", "alpha"), [("rank", 0.3), ("zscore", 0.1), ("none", 0.05)])
def test_quadratic_bowl_in_50_dimensions(shaping, alpha):
    config = MetaESConfig(N=40, sigma=0.1, sigma_decay=0.99, alpha=alpha, shaping=shaping, init_scale=0.0)
    target = torch.linspace(-1, 1, 50, dtype=torch.float64)
    state = fresh(config, 50)
    start = (state.center - target).square().sum().item()
    for _ in range(250):
        state = es.update(state, config, measure(state, config, lambda x: -float((x - target).square().sum())))
    assert (state.center - target).square().sum().item() < 1e-2 * start
