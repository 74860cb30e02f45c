"""A model that cannot be loaded is one message that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from aligntune.config.sft import ModelConfig
from aligntune.errors import ConfigError, ModelError
from aligntune.models.load import load_model
from aligntune.models.precision import Precision


def load(folder: Path, **settings: object) -> None:
    load_model(ModelConfig(name_or_path=str(folder), **settings), Precision(torch.float32), trained=True)


def change(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damaged_weights(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    file = folder / "model.safetensors"
    for kept in (5000, 0):
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ModelError, match="a weight file is damaged or cut off"):
            load(folder)


def test_a_config_that_does_not_fit(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    change(folder, vocab_size=100)
    with pytest.raises(ModelError, match=r"other shapes than its config\.json says"):
        load(folder)
    change(folder, model_type="foo")
    with pytest.raises(ModelError, match="model type `foo`"):
        load(folder)


def test_settings_of_loading(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model\.model_init_kwargs\.foo: the model takes no such argument"):
        load(folder, model_init_kwargs={"foo": 1})
    if not torch.cuda.is_available():
        for place in ("cuda", {"": 0}):
            with pytest.raises(ConfigError, match=r"model\.device_map: .* no CUDA device"):
                load(folder, device_map=place)
        with pytest.raises(ConfigError, match=r"model\.max_memory: names 0, and this machine has no CUDA device"):
            load(folder, max_memory={"0": "20GB"})
    for place in ("foo", {"model": "foo"}):
        with pytest.raises(ConfigError, match=r"model\.device_map: 'foo' is not a device"):
            load(folder, device_map=place)
    with pytest.raises(ConfigError, match=r"model\.max_memory: '20 potatoes' is not a size"):
        load(folder, max_memory={"cpu": "20 potatoes"})


def test_the_folder_of_a_run_names_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"did you mean .*run/model"):
        load(tmp_path / "run")
