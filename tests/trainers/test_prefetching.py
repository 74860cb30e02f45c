"""Batches read ahead are those of the plain loop, in its order; errors come in the step that needs the batch."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event

import pytest
import torch

from aligntune.trainers.prefetching import BatchesAhead


def test_the_same_batches_over_two_epochs() -> None:
    ahead = BatchesAhead(torch.device("cpu"))
    for _ in range(2):
        epoch = iter(range(5))
        assert [ahead.take(epoch, 2) for _ in range(3)] == [[0, 1], [2, 3], [4]]


def test_the_next_step_is_read_while_this_one_runs() -> None:
    read = [Event() for _ in range(4)]

    def batches() -> Iterator[int]:
        for at, event in enumerate(read):
            event.set()
            yield at

    ahead, source = BatchesAhead(torch.device("cpu")), batches()
    assert ahead.take(source, 1) == [0]
    assert read[1].wait(10)
    assert not read[2].is_set()


def test_an_error_waits_for_its_step() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise ValueError("a bad row")

    ahead, source = BatchesAhead(torch.device("cpu")), batches()
    assert ahead.take(source, 1) == [1]
    with pytest.raises(ValueError, match="a bad row"):
        ahead.take(source, 1)
