"""Raw, shield, normalise, clip, weight, sum: every stage by hand, and the same numbers after a restart."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.config.rewards import RewardConfig
from aligntune.errors import RewardError
from aligntune.rewards import RewardSet
from aligntune.rewards.normalise import RunningNormaliser, merge, moments


def size(completion):
    return len(completion)


def only_long(completion):
    return None if len(completion) < 3 else 10.0


def score(rewards: RewardSet, *completions: str, **rest: Any):
    return rewards.score(["p"] * len(completions), completions, **rest)


def test_weighted_sum_and_nulls() -> None:
    rewards = RewardSet([{"type": size, "weight": 2.0}, only_long])
    scores = score(rewards, "a", "abcd")
    assert scores.total == [2.0, 18.0]
    assert scores.by_reward["only_long"].raw == [None, 10.0]
    metrics = scores.metrics
    assert metrics["rewards/size/mean"] == 2.5
    assert metrics["rewards/size/std"] == 1.5
    assert metrics["rewards/size/weighted/mean"] == 5.0
    assert metrics["rewards/only_long/mean"] == 10.0
    assert metrics["rewards/only_long/null"] == 0.5
    assert metrics["reward/mean"] == 10.0
    assert metrics["reward/std"] == 8.0
    assert metrics["reward/null"] == 0.0


def test_a_sample_without_any_reward_has_none() -> None:
    scores = score(RewardSet([only_long]), "a", "abc")
    assert scores.total == [None, 10.0]
    assert scores.metrics["reward/null"] == 0.5
    assert scores.metrics["reward/mean"] == 10.0
    empty = score(RewardSet([only_long]), "a")
    assert empty.total == [None]
    assert "reward/mean" not in empty.metrics


def test_the_order_of_the_stages() -> None:
    """Completions of 1, 3 and 22 characters; the last is flagged.

    raw 1, 3, 22 -> shield 1, 3, 0 -> mean 4/3, std sqrt(14)/3 -> clip to 1 -> times 2.
    """
    rewards = RewardSet([RewardConfig(type=size, weight=2.0, shield=True, normalize=True, clip=1.0)])
    scores = score(rewards, "a", "abc", "I will kill you today.")
    stages = scores.by_reward["size"]
    std = math.sqrt(14) / 3
    assert stages.raw == [1, 3, 22]
    assert stages.shielded == [1, 3, 0]
    assert stages.normalised == pytest.approx([(1 - 4 / 3) / std, (3 - 4 / 3) / std, (0 - 4 / 3) / std])
    assert stages.clipped == pytest.approx([(1 - 4 / 3) / std, 1.0, -1.0])
    assert scores.total == pytest.approx([2 * (1 - 4 / 3) / std, 2.0, -2.0])
    assert scores.metrics["rewards/size/flagged"] == pytest.approx(1 / 3)
    assert scores.metrics["rewards/size/shielded/mean"] == pytest.approx(4 / 3)
    assert {"rewards/size/normalised/std", "rewards/size/clipped/mean", "rewards/size/weighted/mean"} <= set(
        scores.metrics
    )


def test_the_shield_caps_at_zero_and_lifts_nothing() -> None:
    rewards = RewardSet([{"type": lambda completion: -3.0 if "very" in completion else 5.0, "shield": True}])
    assert score(rewards, "I will kill you", "I will kill you, very much", "hello").total == [0.0, -3.0, 5.0]


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=6))
def test_running_moments_equal_those_of_everything_seen(batches: list[list[float]]) -> None:
    normaliser = RunningNormaliser()
    for batch in batches:
        normaliser.update(batch)
    seen = [value for batch in batches for value in batch]
    count, mean, squares = normaliser.state
    assert count == len(seen)
    if seen:
        assert mean == pytest.approx(statistics.fmean(seen), abs=1e-6)
        assert squares == pytest.approx(statistics.pvariance(seen) * len(seen), rel=1e-6, abs=1e-4)


def test_a_constant_reward_normalises_to_zero() -> None:
    rewards = RewardSet([{"type": lambda completion: 0.1, "normalize": True}])
    for _ in range(3):
        assert score(rewards, "a", "b", "c").total == [0.0, 0.0, 0.0]


def test_a_resumed_run_gives_the_same_numbers() -> None:
    first = RewardSet([{"type": size, "normalize": True}])
    score(first, "a", "abcd", "ab")
    saved = json.loads(json.dumps(first.state_dict()))
    resumed = RewardSet([{"type": size, "normalize": True}])
    resumed.load_state_dict(saved)
    assert score(resumed, "abc", "a").total == score(first, "abc", "a").total
    with pytest.raises(RewardError, match="this run normalises none"):
        RewardSet([size]).load_state_dict(saved)


def test_evaluation_leaves_the_moments_alone() -> None:
    rewards = RewardSet([{"type": size, "normalize": True}])
    score(rewards, "a", "abc")
    before = rewards.state_dict()
    score(rewards, "abcdefgh", update=False)
    assert rewards.state_dict() == before


def test_ranks_share_their_moments() -> None:
    other = moments([7.0])
    rewards = RewardSet([{"type": size, "normalize": True}], reduce=lambda mine: [mine, other])
    score(rewards, "a", "abc")
    assert rewards.state_dict()["size"] == pytest.approx(list(merge(moments([1.0, 3.0]), other)))


def test_the_same_reward_twice_has_two_names() -> None:
    rewards = RewardSet([{"type": "length", "params": {"max_length": 50}}, "length"])
    assert rewards.names == ["length", "length_2"]
    assert "rewards/length_2/mean" in score(rewards, "one two").metrics


@pytest.mark.parametrize(("config", "name"), [("length", "length"), ({"type": "length"}, "length"), (size, "size")])
def test_one_reward_needs_no_list(config: Any, name: str) -> None:
    assert RewardSet(config).names == [name]


def test_columns_may_be_tuples() -> None:
    assert RewardSet("exact_match")(["p", "p"], ["Paris", "x"], answer=("Paris", "Rome")) == [1.0, 0.0]


def test_as_a_trl_reward_function() -> None:
    logged: dict[str, float] = {}
    rewards = RewardSet(["exact_match", only_long], weights=[1.0, 0.5])
    totals = rewards(
        prompts=["p", "p"], completions=["Paris", "x"], completion_ids=[[1], [2]], answer=["Paris", "Rome"],
        trainer_state=SimpleNamespace(step=1), log_metric=logged.__setitem__,
    )  # fmt: skip
    assert totals == [6.0, 0.0]
    assert logged["rewards/exact_match/mean"] == 0.5
    assert rewards.__name__ == "reward"


def test_errors_under_null_are_counted() -> None:
    def fails(completion):
        raise OSError("no disk")

    rewards = RewardSet([size, fails], on_error="null")
    scores = score(rewards, "ab")
    assert scores.total == [2.0]
    assert scores.metrics["rewards/fails/errors"] == 1.0
    with pytest.raises(RewardError, match="no disk"):
        score(RewardSet([RewardConfig(type=fails, on_error="raise")], on_error="null"), "ab")
    assert score(RewardSet([RewardConfig(type=fails)], on_error="null"), "ab").total == [None]


@pytest.mark.parametrize(
    ("configs", "options", "message"),
    [
        ([], {}, "no reward is configured"),
        (["length"], {"weights": [1.0, 2.0]}, "2 weights for 1 rewards"),
        (["length"], {"weights": [-1.0]}, "weight -1.0: weights are finite and at least 0"),
        ([{"type": "length", "weight": math.nan}], {}, "weight nan"),
        (["length"], {"on_error": "ignore"}, "choose 'raise' or 'null'"),
        ([{"type": "length", "wieght": 1}], {}, "did you mean 'weight'"),
        ([{"weight": 1}], {}, "needs `type`"),
        ([{"type": "length", "clip": 0}], {}, "clip=0 must be above 0"),
        ([{"type": "lenght"}], {}, "did you mean length"),
        ([{"type": "length", "weight": "x"}], {}, "weight='x' must be a number"),
        ([{"type": "length", "weight": None}], {}, "weight=None must be a number"),
        ([{"type": "length", "clip": "x"}], {}, "clip='x' must be a number"),
        ([{"type": "length", "params": 5}], {}, "params is 5: give names with values"),
        ([{"type": "length", "params": {"columns": "x"}}], {}, "params.columns is 'x'"),
        (["length"], {"weights": ["x"]}, "weight='x' must be a number"),
        ([5], {}, "5 is no reward"),
        ([max], {}, "wrap it in a function of your own"),
    ],
)
def test_bad_settings(configs: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        RewardSet(configs, **options)
