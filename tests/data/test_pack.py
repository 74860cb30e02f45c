"""Packing: the golden cases by hand, the bounds on open inputs, and packed training equal to padded training."""

from __future__ import annotations

import logging
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from aligntune.data.collate import PackedCollator, PaddedCollator
from aligntune.data.masks import IGNORED
from aligntune.data.pack import best_fit_decreasing, pack
from aligntune.errors import ConfigError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents(lengths, ignored=()):
    """Documents of distinct tokens; every document's first label is -100, as the tokeniser makes them."""
    ids, labels, token = [], [], 1
    for size in lengths:
        row = list(range(token, token + size))
        token += size
        ids.append(row)
        labels.append([IGNORED, *(IGNORED if t in ignored else t for t in row[1:])])
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": list(lengths)})


def flat(lists):
    return list(chain.from_iterable(lists))


def lengths_in(packed):
    """The document lengths of each row, by where positions restart."""
    rows = []
    for row in packed:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        rows.append(np.diff([*starts, len(row["position_ids"])]).tolist())
    return rows


class TestGolden:
    def test_bfd(self):
        assert lengths_in(pack(documents([5, 4, 3, 2, 2]), 6)) == [[5], [4, 2], [3, 2]]

    def test_bfd_cuts_long_documents(self, caplog):
        with caplog.at_level(logging.WARNING):
            packed = pack(documents([8, 3, 1]), 6)
        assert lengths_in(packed) == [[6], [3, 1]]
        assert packed[0]["input_ids"] == [1, 2, 3, 4, 5, 6]
        assert "cuts 1 of 3 documents to 6 tokens: 2 tokens lost" in caplog.text

    @pytest.mark.parametrize("lengths", [[5, 4, 3, 2, 2], [8, 3, 1, 4]])
    def test_wrapped(self, lengths):
        packed = pack(documents(lengths), 6, "wrapped")
        assert packed["length"][:] == [6, 6, 4]
        assert flat(packed["input_ids"][:]) == list(range(1, 17))
        assert "position_ids" not in packed.column_names

    def test_labels(self):
        packed = pack(documents([3, 2]), 6)[0]
        assert packed["input_ids"] == [1, 2, 3, 4, 5]
        assert packed["labels"] == [IGNORED, 2, 3, IGNORED, 5]
        assert packed["position_ids"] == [0, 1, 2, 0, 1]
        wrapped = pack(documents([3, 4]), 4, "wrapped")
        assert wrapped["labels"][:] == [[IGNORED, 2, 3, IGNORED], [IGNORED, 6, 7]]

    @pytest.mark.parametrize("streams", [False, True])
    def test_no_document_begins_with_a_target(self, streams):
        """Whatever the rows say: the token before it belongs to another document, or to none."""
        ids = [[1, 2, 3], [4, 5]]
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "length": [3, 2], "source": ["a", "b"]})
        rows = rows.to_iterable_dataset() if streams else rows
        assert [list(row["labels"]) for row in pack(rows, 6)] == [[IGNORED, 2, 3, IGNORED, 5]]
        assert [list(row["labels"]) for row in pack(rows, 4, "wrapped")] == [[IGNORED, 2, 3, IGNORED], [IGNORED]]
        assert "source" not in next(iter(pack(rows, 6)))

    def test_unknown_strategy(self):
        with pytest.raises(ConfigError, match="'ffd' should be bfd or wrapped"):
            pack(documents([1]), 4, "ffd")


class TestBounds:
    @given(LENGTHS, st.integers(1, 50))
    def test_every_document_is_in_one_bin_and_bins_fit(self, lengths, capacity):
        bins = best_fit_decreasing(lengths, capacity)
        assert sorted(flat(bins)) == list(range(len(lengths)))
        assert all(sum(min(lengths[place], capacity) for place in bin) <= capacity for bin in bins)

    @given(LENGTHS, st.integers(1, 50))
    def test_it_is_best_fit_decreasing(self, lengths, capacity):
        """The textbook definition, in quadratic time: bins filled alike (equally tight bins may swap documents)."""
        sizes = [min(size, capacity) for size in lengths]
        spaces = []
        for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
            fitting = [bin for bin, space in enumerate(spaces) if space >= sizes[place]]
            if not fitting:
                spaces.append(capacity)
                fitting = [len(spaces) - 1]
            tightest = min(spaces[bin] for bin in fitting)
            bin = next(bin for bin in fitting if spaces[bin] == tightest)
            spaces[bin] -= sizes[place]
        found = best_fit_decreasing(lengths, capacity)
        assert sorted(sum(sizes[place] for place in bin) for bin in found) == sorted(
            capacity - space for space in spaces
        )

    @settings(max_examples=15, deadline=None)
    @given(LENGTHS, st.integers(2, 50))
    def test_tokens_are_kept(self, lengths, capacity):
        rows = documents(lengths)
        wrapped = pack(rows, capacity, "wrapped")
        assert flat(wrapped["input_ids"][:]) == flat(rows["input_ids"][:])
        assert set(wrapped["length"][:-1] if len(wrapped) > 1 else [capacity]) == {capacity}
        packed = pack(rows, capacity)
        kept = [token for row in rows["input_ids"] for token in row[:capacity]]
        assert sorted(flat(packed["input_ids"][:])) == sorted(kept)
        assert max(packed["length"]) <= capacity


def test_many_rows_and_processes_give_what_one_batch_gives():
    rng = np.random.default_rng(0)
    rows = documents(rng.integers(1, 30, 3000).tolist())
    one, two = pack(rows, 64), pack(rows, 64, num_proc=2)
    assert one["input_ids"][:] == two["input_ids"][:]
    assert sorted(flat(one["input_ids"][:])) == flat(rows["input_ids"][:])
    for strategy in ("bfd", "wrapped"):
        packed = pack(rows, 64, strategy)
        assert len(packed) <= 1.02 * (sum(rows["length"]) / 64) + 1
    flat_ids, flat_labels = flat(packed["input_ids"][:]), flat(packed["labels"][:])
    expected = flat(rows["labels"][:])
    expected[::64] = [IGNORED] * len(expected[::64])
    assert flat_ids == flat(rows["input_ids"][:])
    assert flat_labels == expected


def test_dropped_rows_are_not_packed():
    rows = documents([3, 2, 4]).select([2, 0])
    assert pack(rows, 8)[0]["input_ids"] == [6, 7, 8, 9, 1, 2, 3]
    assert pack(rows, 8, "wrapped")[0]["input_ids"] == [6, 7, 8, 9, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_streams_are_packed_in_windows(strategy):
    rows = documents([3] * 1500)
    packed = list(pack(rows.to_iterable_dataset(), 6, strategy))
    assert sorted(np.concatenate([row["input_ids"] for row in packed]).tolist()) == list(range(1, 4501))
    assert {len(row["input_ids"]) for row in packed} == {6}


class TestTraining:
    """Loss and gradients of packed and padding-free batches against the padded batch, float32 on a tiny Llama."""

    LENGTHS = (9, 1, 5, 12, 3, 7)

    @pytest.fixture(scope="class", params=["sdpa", "eager"])
    def model(self, request):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, attn_implementation=request.param,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    @pytest.fixture
    def rows(self):
        return documents(self.LENGTHS, ignored=(3, 17, 18))

    def loss_and_gradients(self, model, batches):
        model.zero_grad()
        items = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
        assert sum((batch["labels"] != IGNORED).sum() for batch in batches) == items
        total = 0.0
        for batch in batches:
            loss = model(**batch, use_cache=False, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        return total, {name: weight.grad.clone() for name, weight in model.named_parameters()}

    def check(self, model, rows, batches):
        padded = [PaddedCollator(pad_token_id=0)(list(rows))]
        loss, gradients = self.loss_and_gradients(model, padded)
        other, others = self.loss_and_gradients(model, batches)
        assert other == pytest.approx(loss, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4)

    def test_padding_free(self, model, rows):
        self.check(model, rows, [PackedCollator()(list(rows))])

    def test_padding_free_to_a_multiple(self, model, rows):
        batch = PackedCollator(pad_to_multiple_of=16)(list(rows))
        assert batch["input_ids"].shape == (1, 48)
        self.check(model, rows, [batch])

    def test_packed_all_in_one_batch(self, model, rows):
        self.check(model, rows, [PackedCollator()(list(pack(rows, 16)))])

    def test_packed_one_row_a_batch(self, model, rows):
        self.check(model, rows, [PackedCollator()([row]) for row in pack(rows, 16)])

    def test_padded_micro_batches(self, model, rows):
        rows = list(rows)
        self.check(model, rows, [PaddedCollator(0, pad_to_multiple_of=8)([row]) for row in rows])

    def test_boundaries_matter(self, model, rows):
        """Without restarting positions the loss is another: the tests above can fail."""
        batch = PackedCollator()(list(rows))
        loss, _ = self.loss_and_gradients(model, [batch])
        leaking = {name: batch[name] for name in ("input_ids", "labels")}
        other, _ = self.loss_and_gradients(model, [leaking])
        assert abs(other - loss) > 1e-4


@pytest.mark.parametrize("capacity", [1023, 1024, 5000, 300_000])
def test_large_bins_are_filled_as_small_ones_are(capacity):
    """Each document into the bin with the least room that is enough, of several into the one that changed last."""
    lengths = np.random.default_rng(capacity).integers(1, capacity * 2 // 3, 200)
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room, when it changed)
    for time, document in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        size = int(lengths[document])
        fits = [at for at, (left, _) in enumerate(room) if left >= size]
        if not fits:
            bins.append([])
            room.append((capacity, time))
            fits = [len(bins) - 1]
        at = min(fits, key=lambda at: (room[at][0], -room[at][1]))
        bins[at].append(document)
        room[at] = (room[at][0] - size, time)
    assert best_fit_decreasing(lengths, capacity) == bins
