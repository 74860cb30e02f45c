"""Words that transformers does not know, and packages that an optimiser needs, are errors in the setting's name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aligntune.config.resolve import resolve
from aligntune.errors import ConfigError, MissingExtra
from aligntune.models.precision import Precision
from aligntune.trainers import arguments as of_arguments
from aligntune.trainers.arguments import training_arguments


def made(folder: Path, **arguments: object) -> Any:
    run = resolve({"model": "m", "dataset": "d"}, arguments=arguments, algorithm="sft").config
    return training_arguments(run, folder, Precision(torch.float32))


def test_batches_reach_a_gpu_without_waiting_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes page-locked memory to copy from."""
    assert not made(tmp_path).accelerator_config.non_blocking
    monkeypatch.setattr(of_arguments, "device", lambda: torch.device("cuda"))
    on_gpu = made(tmp_path)
    assert on_gpu.dataloader_pin_memory
    assert on_gpu.accelerator_config.non_blocking


def test_unknown_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer: adam_w is not a valid"):
        made(tmp_path, optimizer="adam_w")
    with pytest.raises(ConfigError, match=r"train\.lr_scheduler: cosin is not a valid"):
        made(tmp_path, lr_scheduler="cosin")


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adamw_bnb_8bit"])
def test_an_optimiser_of_bitsandbytes_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match="bitsandbytes"):
        made(tmp_path, optimizer=name)
