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


@pytest.mark.parametrize("setting", ["optimizer", "lr_scheduler"])
def test_a_name_that_the_installed_transformers_lacks(tmp_path: Path, setting: str) -> None:
    run = resolve({"model": "m", "dataset": "d"}, algorithm="sft").config
    run = run.model_copy(update={"train": run.train.model_copy(update={setting: "of_another_version"})})
    with pytest.raises(ConfigError, match=rf"train\.{setting}: of_another_version is not a valid"):
        training_arguments(run, tmp_path, Precision(torch.float32))


@pytest.mark.parametrize(("name", "module"), [
    ("schedule_free_adamw", "schedulefree"), ("adamw_torch_4bit", "torchao"), ("stable_adamw", "optimi"), ("adalomo", "lomo_optim"),
])  # fmt: skip
def test_an_optimiser_of_another_package_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setattr(of_arguments, "find_spec", lambda asked: None if asked == module else asked)
    with pytest.raises(ConfigError, match=rf"train\.optimizer: {name} needs the package {module}.*pip install"):
        made(tmp_path, optimizer=name)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adamw_bnb_8bit"])
def test_an_optimiser_of_bitsandbytes_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match="bitsandbytes"):
        made(tmp_path, optimizer=name)
