"""What a stream cannot do is refused before anything is loaded."""

from __future__ import annotations

import pytest

from aligntune.config.resolve import resolve
from aligntune.errors import ConfigError

RUN = {"algorithm": "sft", "model": {"name_or_path": "m"}, "dataset": {"name": "d", "streaming": True}}


def test_a_stream_with_max_steps_is_fine() -> None:
    assert resolve(RUN | {"train": {"max_steps": 5}}).config.train.max_steps == 5


def test_steps_are_required() -> None:
    with pytest.raises(ConfigError, match=r"train\.max_steps: is required"):
        resolve(RUN)


def test_lengths_are_not_known() -> None:
    with pytest.raises(ConfigError, match="group_by_length"):
        resolve(RUN | {"train": {"max_steps": 5, "group_by_length": True}})
