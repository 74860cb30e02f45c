"""Mixing by weight: shares, completeness, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.data.mix import mix, mix_order
from aligntune.errors import ConfigError, DataError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@st.composite
def sizes_and_weights(draw):
    sizes = draw(SIZES)
    return sizes, draw(st.lists(st.floats(0.1, 5), min_size=len(sizes), max_size=len(sizes)))


@settings(max_examples=60, deadline=None)
@given(sizes_and_weights(), st.integers(0, 5))
def test_every_stretch_has_the_weights_shares(case, seed):
    sizes, weights = case
    sources, rows = mix_order(sizes, weights, seed)
    shares = np.asarray(weights) / sum(weights)
    for source, size in enumerate(sizes):
        taken = np.cumsum(sources == source)
        assert abs(taken[-1] - len(sources) * shares[source]) <= len(sizes)
        expected = taken[-1] * np.arange(1, len(sources) + 1) / len(sources)
        assert np.abs(taken - expected).max() <= len(sizes) + 1
        own = rows[sources == source]
        assert set(own[:size]) == set(range(size))  # each pass has every row once, so every row comes at least once
        assert len(own) >= size


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 5))
def test_without_weights_every_row_comes_once(sizes, seed):
    sources, rows = mix_order(sizes, None, seed)
    assert sorted(zip(sources.tolist(), rows.tolist())) == [(s, r) for s, size in enumerate(sizes) for r in range(size)]


def test_by_hand():
    """3 to 1: dataset 0 has 30 rows, so 10 come from dataset 1, whose 4 rows come two and a half times."""
    sources, rows = mix_order([30, 4], [3.0, 1.0], seed=0)
    assert np.bincount(sources).tolist() == [30, 10]
    assert sorted(np.bincount(rows[sources == 1]).tolist()) == [2, 2, 3, 3]


def test_order_is_a_function_of_seed_and_sizes():
    one, two, other = (mix_order([50, 50], [1, 2], seed) for seed in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert (one[1] != other[1]).any()


def parts():
    first = Dataset.from_dict({"n": list(range(6)), "only": ["x"] * 6})
    return [first, Dataset.from_dict({"n": list(range(100, 102))})]


def test_datasets_are_mixed_with_the_columns_that_all_have():
    rows = mix(parts(), [3.0, 1.0], seed=1)
    assert rows.column_names == ["n"]
    assert sorted(rows["n"]) == [0, 1, 2, 3, 4, 5, 100, 101]
    assert rows["n"][:] == mix(parts(), [3.0, 1.0], seed=1)["n"][:]
    assert rows["n"][:] != sorted(rows["n"])


def test_one_dataset_stays_as_it_is():
    (first, _) = parts()
    assert mix([first], [2.0], seed=1) is first


def test_streams_are_drawn_by_weight():
    streams = [Dataset.from_dict({"n": [source] * 400}).to_iterable_dataset() for source in (0, 1)]
    drawn = [row["n"] for row in mix(streams, [3.0, 1.0], seed=1)][:400]
    assert 240 < drawn.count(0) < 360
    again = [row["n"] for row in mix(streams, [3.0, 1.0], seed=1)][:400]
    assert drawn == again


def test_bad_weights():
    with pytest.raises(ConfigError, match="each of the 2 datasets needs a weight above 0"):
        mix(parts(), [1.0, 0.0], seed=1)
    with pytest.raises(ConfigError, match="or none"):
        mix([parts()[0], parts()[1].to_iterable_dataset()], None, seed=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_other_types_are_named(streaming):
    parts = [Dataset.from_dict({"n": [1], "id": [1]}), Dataset.from_dict({"n": [2], "id": ["two"]})]
    if streaming:
        parts = [part.to_iterable_dataset() for part in parts]
    with pytest.raises(DataError, match=r"cannot be mixed: 'id' is Value\('int64'\) and Value\('string'\)"):
        mix(parts, None, seed=0)
