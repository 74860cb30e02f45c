"""Is this a model? What a folder holds, and what to say when it is not one."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from aligntune.errors import ModelError


def is_model_folder(name: str) -> bool:
    """True for a local model or adapter, False for a hub name; a path that is neither is a `ModelError`."""
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return True
        nested = [
            str(found.parent) for kind in ("config", "adapter_config") for found in sorted(path.glob(f"*/{kind}.json"))
        ]
        hint = f"; did you mean {nested[0]}?" if nested else ""
        if (path / "status.json").exists():
            saved = sorted(path.glob("checkpoints/checkpoint-*"), key=lambda found: found.stat().st_mtime)
            hint = ". It holds a run that has not come to its end: continue it with --resume auto"
            hint += f", or name its last checkpoint, {saved[-1]}" if saved else ""
        raise ModelError(f"{name}: is a folder without config.json or adapter_config.json, so not a model{hint}")
    if path.is_file():
        raise ModelError(f"{name}: is a file; a model is a folder with config.json and weights, or a hub name")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        close = difflib.get_close_matches(path.name, [item.name for item in path.parent.glob("*")], n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        raise ModelError(f"{name}: no such folder{hint}")
    return False


def model_folder(name: str) -> str:
    """`name`, or the folder `model` in it when it is the folder of a run."""
    inside = Path(name).expanduser() / "model"
    is_run = inside.is_dir() and not (inside.parent / "config.json").exists()
    return str(inside) if is_run else name


ON_TOP = " + "
"""Between the names of what an adapter lies on, where that is more than a model: the model, then the adapters that are merged
into it. It is the name of no model, so that no reader loads the model and leaves the adapters out."""


def adapter_base(name: str) -> str | None:
    """The model below a local adapter folder, and below all adapters that it lies on; None when `name` is not one."""
    recorded = _lies_on(name)
    return None if recorded is None else recorded[0]


def adapters_of(name: str) -> list[str]:
    """The adapters that belong on `adapter_base(name)`, lowest first; the last is `name`. Raises `ModelError` when one is gone."""
    below = (_lies_on(name) or [])[1:]
    for other in below:
        if not (Path(other).expanduser() / "adapter_config.json").exists():
            raise ModelError(
                f"{name}: lies on the adapter {other}, which is not there; put it back, or write where it is now into "
                f"{Path(name) / 'adapter_config.json'} (base_model_name_or_path)"
            )
    return [*below, name]


def _lies_on(name: str) -> list[str] | None:
    file = Path(name) / "adapter_config.json"
    if not file.exists() or (Path(name) / "config.json").exists():
        return None
    try:
        recorded: str | None = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise ModelError(f"{file}: is damaged ({error}); copy it again") from error
    if recorded is None:
        raise ModelError(
            f"{file}: does not say which model the adapter goes on; write its name there as base_model_name_or_path"
        )
    return [recorded] if Path(recorded).exists() else recorded.split(ON_TOP)


def explain_missing(name: str, part: str, error: Exception) -> str:
    """One paragraph for a model or tokenizer that cannot be loaded."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).is_dir():
        return f"{name}: its {part} cannot be loaded ({first_line})"
    if "trust_remote_code" in str(error):
        return f"{name}: needs its own code to load. Read that code, then allow it with trust_remote_code: true"
    return (
        f"{name}: no such folder, and its {part} cannot be had from the hub ({first_line}). "
        "Give a local folder, or check the name, the network and the access token"
    )
