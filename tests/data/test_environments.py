"""Generated tasks as datasets: by seed and split, scored by their own scorer."""

from __future__ import annotations

import json
import sys

import pytest

from aligntune.config.resolve import resolve
from aligntune.config.rl import DatasetConfig
from aligntune.data import load_rows
from aligntune.errors import ConfigError, DataError, MissingExtra
from aligntune.rewards import RewardSet

TASK = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("reasoning_gym")


def rows(name: str = TASK, seed: int = 1, **settings):
    return load_rows(DatasetConfig(name=name, **({"max_samples": 6} | settings)), seed=seed)


def test_rows_depend_on_seed_and_split_alone():
    assert rows()[:] == rows()[:]
    assert rows()["prompt"] != rows(seed=2)["prompt"]
    assert rows()["prompt"] != rows(split="test")["prompt"]
    assert len(rows(max_samples=None)) == 500
    assert len(rows(percent=50.0)) == 3


def test_settings_of_the_task_act():
    for row in rows():
        terms = json.loads(row["entry"])["metadata"]["expression"].split()
        assert len(terms) == 3  # a sign between two terms
        assert all(len(term) == 1 for term in terms)


def test_gold_answers_score_1():
    found = rows()
    columns = {name: found[name] for name in found.column_names}
    answers = list(found["answer"])
    assert RewardSet(["reasoning_gym"]).score(found["prompt"], answers, columns).total == [1.0] * 6
    assert max(RewardSet(["reasoning_gym"]).score(found["prompt"], ["none of it"] * 6, columns).total) < 0.2


def test_a_run_on_them_needs_no_reward_of_its_own():
    base = {"algorithm": "grpo", "model": {"name_or_path": "x"}}
    assert [entry.type for entry in resolve({**base, "dataset": {"name": TASK}}).config.rewards] == ["reasoning_gym"]
    named = resolve({**base, "dataset": {"name": TASK}, "rewards": [{"type": "length"}]}).config.rewards
    assert [entry.type for entry in named] == ["length"]
    with pytest.raises(ConfigError, match="rewards"):
        resolve({**base, "datasets": [{"name": TASK}, {"name": "other.jsonl"}]})


@pytest.mark.parametrize(("name", "error", "message"), [
    ("reasoning_gym:chain_sums", DataError, "did you mean chain_sum"),
    ("reasoning_gym:chain_sum?terms=2", ConfigError, "terms"),
    ("reasoning_gym:chain_sum?min_terms=0", ConfigError, "min_terms"),
])  # fmt: skip
def test_mistakes(name, error, message):
    with pytest.raises(error, match=message):
        rows(name)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match=r"aligntune\[rewards\]"):
        rows()
