"""`reward test`: gold answers score full marks, wrong ones do not; and the table of all rewards."""

from __future__ import annotations

import json

import pytest

from aligntune.errors import DataError
from aligntune.rewards import RewardSet, base
from aligntune.rewards.table import markdown, rows
from aligntune.rewards.validate import Distribution, validate

GOLD = [f"{n} + {n} = {2 * n}\n#### {2 * n}" for n in range(3, 13)]
PROMPTS = ["p"] * len(GOLD)


def test_a_sound_reward_passes() -> None:
    (check,) = validate(RewardSet(["gsm8k"]), PROMPTS, GOLD, {"answer": GOLD})
    assert check.passed
    assert check.full == 1
    assert check.distributions["gold"].mean == 1.0
    assert check.distributions["gold"].count == 10
    assert check.distributions["other row"].mean == 0.0
    assert check.distributions["empty"].mean == 0.0
    assert check.distributions["changed numbers"].mean == 0.0
    assert check.distributions["gold"].histogram == (0,) * 9 + (10,)


def test_gold_below_full_marks_fails_and_shows_the_row() -> None:
    answers = [*GOLD[:-1], "#### 999"]
    (check,) = validate(RewardSet(["gsm8k"]), PROMPTS, GOLD, {"answer": answers})
    assert not check.passed
    assert "10.0% of the gold answers score below 1; the first is row 9 with 0.0" in check.problem
    assert check.gold_below_full[0].completion == GOLD[-1]


def test_a_reward_that_likes_everything_fails() -> None:
    (check,) = validate(RewardSet(["length"]), PROMPTS, ["word " * 20 + str(n) for n in range(10)], {})
    assert "100.0% of the answers of other rows score full marks too" in check.problem


def test_an_answer_that_two_rows_share_is_not_wrong() -> None:
    golds = ["#### 1"] * 9 + ["#### 2"]
    (check,) = validate(RewardSet(["gsm8k"]), PROMPTS, golds, {"answer": golds})
    assert check.passed
    assert check.distributions["other row"].count <= 2


def test_rewards_without_a_maximum_must_prefer_gold() -> None:
    def closeness(completion, answer):
        return -abs(len(completion) - len(answer))

    golds = ["x" * n for n in range(1, 11)]
    assert validate(RewardSet([closeness]), PROMPTS, golds, {"answer": golds})[0].passed
    check = validate(RewardSet([lambda completion: 3.0]), PROMPTS, golds, {})[0]
    assert "do not score above" in check.problem
    check = validate(RewardSet([lambda completion: None]), PROMPTS, golds, {})[0]
    assert "applies to no gold answer" in check.problem


def test_the_same_seed_gives_the_same_wrong_answers() -> None:
    rewards = RewardSet(["f1"])
    first, second = (validate(rewards, PROMPTS, GOLD, {"answer": GOLD}, seed=3)[0].distributions for _ in range(2))
    assert first == second != validate(rewards, PROMPTS, GOLD, {"answer": GOLD}, seed=4)[0].distributions


def test_one_row_is_too_few() -> None:
    with pytest.raises(DataError, match="at least 2 rows"):
        validate(RewardSet(["gsm8k"]), ["p"], GOLD[:1], {"answer": GOLD[:1]})


def test_distributions_by_hand() -> None:
    found = Distribution.of([0.0, None, 1.0, 0.5, 0.25, 0.75], 0, 1)
    assert (found.count, found.nulls, found.mean) == (5, 1, 0.5)
    assert found.quantiles == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.histogram == (1, 0, 1, 0, 0, 1, 0, 1, 0, 1)
    assert Distribution.of([None], 0, 1) == Distribution(0, 1, None, ())


def test_the_table_has_every_reward() -> None:
    found = rows()
    assert [row["name"] for row in found] == base.names()
    assert json.loads(json.dumps(found, default=str))
    page = markdown()
    for name in base.names():
        assert f"### {name}\n" in page
        assert f"| [`{name}`](#{name}) |" in page
    assert all(line.count("|") >= 4 for line in page.splitlines() if line.startswith("| "))
