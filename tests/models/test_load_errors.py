"""A model that cannot be loaded is one message that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import tiny
from aligntune.config import rl
from aligntune.config.sft import ModelConfig
from aligntune.errors import ConfigError, ModelError
from aligntune.models.load import load_model, loading_arguments
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


def test_what_the_settings_ask_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(kind: Any = ModelConfig, trained: bool = True, init: Any = None, **settings: object) -> dict[str, Any]:
        return loading_arguments(kind(name_or_path="m", **settings), Precision(torch.bfloat16), trained, init)

    float32 = {"dtype": torch.float32}  # masters of what is trained
    assert asked() == asked(device_map="auto") == float32
    assert asked(trained=False) == {"dtype": torch.bfloat16}
    assert asked(device_map="cpu") == float32 | {"device_map": "cpu"}
    limits = {"cpu": "20GB"}
    assert asked(max_memory=limits) == float32 | {"max_memory": limits, "device_map": "auto"}
    assert asked(max_memory=limits, device_map="balanced") == float32 | {"max_memory": limits, "device_map": "balanced"}
    assert asked(model_init_kwargs={"revision": "r"}) == float32 | {"revision": "r"}
    assert asked(init={"use_cache": False}, model_init_kwargs={"revision": "r"}) == float32 | {"use_cache": False}
    assert asked(rl.ModelConfig, trust_remote_code=True) == float32 | {"trust_remote_code": True}
    with pytest.raises(ConfigError, match=r"model\.model_init_kwargs\.torch_dtype: .* model\.precision; use that"):
        asked(model_init_kwargs={"torch_dtype": "float16"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert asked(max_memory={"0": "20GiB"})["max_memory"] == {0: "20GiB"}


def test_a_config_is_read_from_where_its_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision and folder within a repository, but nothing that would become a field of the config."""
    read: list[dict[str, Any]] = []
    plain = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **given: read.append(given) or plain(name, **given))
    folder = tiny.write_model(tmp_path / "model")
    given = {"revision": "main", "cache_dir": str(tmp_path), "use_cache": False}
    load(folder, model_init_kwargs=given)
    assert read[0] == {"revision": "main", "cache_dir": str(tmp_path)}


def test_the_folder_of_a_run_names_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"did you mean .*run/model"):
        load(tmp_path / "run")


def test_the_folder_of_a_run_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has not come to its end: continue it with --resume auto$"):
        load(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "checkpoint-20").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"--resume auto, or name its last checkpoint, .*/checkpoint-20$"):
        load(tmp_path / "run")
