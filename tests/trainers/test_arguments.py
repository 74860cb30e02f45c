"""Words that transformers does not know, and packages that an optimiser needs, are errors in the setting's name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from aligntune.config.resolve import resolve
from aligntune.errors import ConfigError, MissingExtra
from aligntune.models.precision import Precision
from aligntune.trainers.arguments import training_arguments


def made(folder: Path, **arguments: object) -> None:
    run = resolve({"model": "m", "dataset": "d"}, arguments=arguments, algorithm="sft").config
    training_arguments(run, folder, Precision(torch.float32))


def test_unknown_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer: adam_w is not a valid"):
        made(tmp_path, optimizer="adam_w")
    with pytest.raises(ConfigError, match=r"train\.lr_scheduler: cosin is not a valid"):
        made(tmp_path, lr_scheduler="cosin")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adamw_bnb_8bit"])
def test_an_optimiser_of_bitsandbytes_needs_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingExtra, match="bitsandbytes"):
        made(tmp_path, optimizer=name)
