"""Where does a policy start? `name_or_path`, other weights of the same architecture (`sft_path`), or adapters by name.

| given | start |
|---|---|
| neither | the weights of `name_or_path` |
| `sft_path`, full weights | those; `name_or_path` gives the tokenizer |
| `sft_path`, an adapter | `name_or_path` with the adapter merged |
| `model_adapter_name`, `ref_adapter_name` | as above, and adapters of these names on top, read from the folder `sft_path/NAME` where there is one (then nothing else of `sft_path` is) |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligntune.config import rl, sft
from aligntune.models.files import adapter_base


def start_of(config: sft.ModelConfig | rl.ModelConfig) -> str:
    """The folder or hub name of the weights that policy and reference start from."""
    if isinstance(config, sft.ModelConfig) or config.sft_path is None or _named_folders(config):
        return config.name_or_path
    return config.sft_path


def base_of(config: sft.ModelConfig | rl.ModelConfig, name: str) -> str | None:
    """The model that the adapter `name` goes on, None when `name` is not an adapter. An adapter as `sft_path` goes on
    `name_or_path`, every other one on the model that it was trained on."""
    base = adapter_base(name)
    is_start = isinstance(config, rl.ModelConfig) and name == config.sft_path
    return config.name_or_path if base is not None and is_start else base


def name_adapters(model: Any, config: sft.ModelConfig | rl.ModelConfig) -> None:
    """Give a policy with a fresh adapter the adapters that the config names, the trained one active.

    A reference adapter that no folder holds is a frozen copy of the trained one as it starts.
    """
    if isinstance(config, sft.ModelConfig):
        return
    trained = config.model_adapter_name or "default"
    folders, below = _named_folders(config), model.peft_config["default"].base_model_name_or_path
    if trained != "default":
        _add(model, trained, folders.get(trained), like="default")
        model.set_adapter(trained)
        model.delete_adapter("default")
    if config.ref_adapter_name is not None:
        _add(model, config.ref_adapter_name, folders.get(config.ref_adapter_name), like=trained)
        model.set_adapter(trained)
    for named in model.peft_config.values():
        named.base_model_name_or_path = below  # not what those read from a folder lay on there


def _add(model: Any, name: str, folder: Path | None, *, like: str) -> None:
    if folder is not None:
        model.load_adapter(str(folder), name, is_trainable=True)
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model.add_adapter(name, model.peft_config[like])
    weights = get_peft_model_state_dict(model, adapter_name=like, save_embedding_layers=False)
    set_peft_model_state_dict(model, weights, name)


def _named_folders(config: rl.ModelConfig) -> dict[str, Path]:
    names = [name for name in (config.model_adapter_name, config.ref_adapter_name) if name is not None]
    start = Path(config.sft_path or config.name_or_path)
    return {name: start / name for name in names if (start / name / "adapter_config.json").exists()}
