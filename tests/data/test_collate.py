"""Batches by hand."""

from __future__ import annotations

import numpy as np
import torch

from aligntune.data.collate import PackedCollator, PaddedCollator

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3},
    {"input_ids": np.array([8, 9], dtype=np.int32), "labels": np.array([-100, 9], dtype=np.int32), "text": "kept out"},
]


def test_padded():
    batch = PaddedCollator(pad_token_id=1)(ROWS)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padded_to_a_multiple_on_the_left():
    batch = PaddedCollator(pad_token_id=1, pad_to_multiple_of=4, padding_side="left")(ROWS)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7], [1, 1, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, 9]]


def test_one_class_a_row():
    batch = PaddedCollator(pad_token_id=1)([{**ROWS[0], "labels": 2}, {**ROWS[1], "labels": 0}])
    assert batch["labels"].tolist() == [2, 0]


def test_after_one_another():
    batch = PackedCollator()([*ROWS, {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 1, 0]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, 2, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 7, 8]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 3]]
    assert "attention_mask" not in batch


def test_after_one_another_to_a_multiple():
    batch = PackedCollator(pad_to_multiple_of=8, pad_token_id=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 4, 4]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]
