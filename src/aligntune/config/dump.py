"""What does a resolved run look like on paper? The re-runnable `config.yaml` and the rows of `aligntune explain`."""

from __future__ import annotations

import enum
import os
from types import ModuleType
from typing import Any

import yaml

from aligntune.config.base import Section
from aligntune.config.resolve import Resolved
from aligntune.config.synonyms import Path, groups


def to_yaml(resolved: Resolved) -> str:
    """The run as YAML: what was set or derived, then every default as a comment.

    Reading it back gives the same run. A callable that cannot be imported by name is written as a comment.
    """
    data, lost = plain_tree(resolved)
    lines = [yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)]
    lines += [f"# not importable by name, set again in Python: {item}\n" for item in lost]
    defaults = [f"#   {path}: {_text(value)}\n" for path, value, origin in resolved.rows() if origin == "default"]
    if defaults:
        lines += ["# Defaults of this version:\n", *defaults]
    return "".join(lines)


def section_to_yaml(key: str, section: Section, comment: str = "") -> str:
    """One section as YAML under `key`, as `to_yaml` writes a run; `comment` is put in front."""
    lost: list[str] = []
    data = {key: _plain(section, (key,), lost)}
    lines = [f"# {comment}\n"] if comment else []
    lines.append(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))
    lines += [f"# not importable by name, set again in Python: {item}\n" for item in lost]
    unset = [name for name in type(section).model_fields if name not in section.model_fields_set]
    lines += ["# Defaults of this version:\n"] if unset else []
    return "".join([*lines, *(f"#   {key}.{name}: {_text(getattr(section, name))}\n" for name in unset)])


def plain_tree(resolved: Resolved) -> tuple[dict[str, Any], list[str]]:
    """What was set or derived as plain data, and the callables and callbacks in it that another process could not import."""
    config = resolved.config
    shown_elsewhere = {path for group in groups(config.algorithm) for path in group.members if path != group.canonical}
    data: dict[str, Any] = {"algorithm": config.algorithm.value}
    lost: list[str] = []
    for key, value in resolved.explicit.items():
        if isinstance(value, dict) and isinstance(getattr(config, key, None), Section):
            value = {name: part for name, part in value.items() if (key, name) not in shown_elsewhere}
        data[key] = _plain(value, (key,), lost)
    return data, lost


def unimportable(config: Section) -> list[str]:
    """Callables among the settings that another process could not import, as `path = address`."""
    lost: list[str] = []
    _plain(config, (), lost)
    return lost


def _plain(value: Any, at: Path, lost: list[str]) -> Any:
    if isinstance(value, Section):
        value = {name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {str(key): _plain(part, (*at, str(key)), lost) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, (*at, index), lost) for index, part in enumerate(value)]
    if callable(value) or hasattr(value, "on_step_end"):
        named = value if hasattr(value, "__qualname__") else type(value)  # of an object, its class says what it is
        address = f"{named.__module__}:{named.__qualname__}"
        bound = getattr(value, "__self__", None) is not None and not isinstance(value.__self__, (type, ModuleType))
        if named is not value or bound or named.__module__ == "__main__" or "<" in named.__qualname__:
            lost.append(f"{'.'.join(map(str, at))} = {address}")
        return address
    return value


def _text(value: Any) -> str:
    return yaml.safe_dump(_plain(value, (), []), default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def origin_rows(resolved: Resolved) -> list[dict[str, str]]:
    """(path, value, origin) of every setting as text, for `config.origins.json` and the report."""
    return [{"path": path, "value": _text(value), "origin": origin} for path, value, origin in resolved.rows()]
