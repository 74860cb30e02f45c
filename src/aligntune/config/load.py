"""What did the user write, and where? YAML files, keyword arguments and command-line overrides become layers.

A layer is a list of entries: a path, a value, and the origin of that value. Nothing here knows what a setting means.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from aligntune.config.synonyms import Path
from aligntune.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """Where a value comes from."""

    kind: str
    """default, file, argument, override or derived."""
    detail: str = ""
    """file:line, the argument's or override's spelling, or why it was derived."""

    def __str__(self) -> str:
        return {"file": self.detail, "default": "default"}.get(self.kind, f"{self.kind} {self.detail}".strip())


@dataclass
class Entry:
    path: Path
    value: Any
    origin: Origin


@dataclass
class Layer:
    """Entries of one source, and the origins of the parts inside their values (for messages)."""

    entries: list[Entry] = field(default_factory=list)
    inside: dict[Path, Origin] = field(default_factory=dict)


SHORTHANDS = {"model": "name_or_path", "dataset": "name", "eval_dataset": "name"}
"""Section -> the setting that a text in its place gives."""
MOST_VALUES = 1_000_000
"""In a file, with what its aliases stand for."""


class _Loader(yaml.SafeLoader):
    """SafeLoader in which 2e-4 is a number, and yes/no/on/off, dates, times (8:00:00) and 0123 stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.removeprefix("tag:yaml.org,2002:") not in ("float", "bool", "int", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?(?:0|[1-9][\d_]*)|0x[\da-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_value(text: str) -> Any:
    """The value of an override: `2e-4` is a number, `true` a boolean, `[a, b]` a list, anything else a string."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def read_yaml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[Path, Origin]]:
    """A YAML file with its `include`s: the data, and `file:line` of every path in it.

    `include` is a path or list of paths relative to the file; what the file says itself wins.
    """
    return _read_file(FilePath(path), ())


def _read_file(path: FilePath, parents: tuple[FilePath, ...]) -> tuple[dict[str, Any], dict[Path, Origin]]:
    resolved = path.resolve()
    if resolved in parents:
        raise ConfigError(f"{path}: includes itself through {' -> '.join(str(parent) for parent in parents)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file ({error})") from error
    origins: dict[Path, Origin] = {}
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{path}:{line}: not valid YAML: it holds the control character {error.character!r}"
        ) from error
    try:
        node = loader.get_single_node()
        data = {} if node is None else _plain(loader, node, (), origins, str(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except RecursionError:
        raise ConfigError(
            f"{path}: an alias (*name) stands within its own anchor (&name), or nesting is too deep"
        ) from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: should hold settings by name, not a {type(data).__name__}")
    includes = data.pop("include", None)
    if includes is None:
        return data, origins
    merged: dict[str, Any] = {}
    merged_origins: dict[Path, Origin] = {}
    names = [includes] if isinstance(includes, str) else includes
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{origins[('include',)]}: include: should be a file or a list of files, got {includes!r}")
    for name in names:
        inner, inner_origins = _read_file(path.parent / str(name), (*parents, resolved))
        _merge_files(merged, inner)
        merged_origins |= inner_origins
    _merge_files(merged, data)
    return merged, merged_origins | origins


def _plain(loader: _Loader, node: yaml.Node, at: Path, origins: dict[Path, Origin], file: str) -> Any:
    origins[at] = Origin("file", f"{file}:{node.start_mark.line + 1}")
    if len(origins) > MOST_VALUES:
        raise ConfigError(f"{file}: holds more than {MOST_VALUES:,} values; aliases (*name) of aliases multiply")
    if isinstance(node, yaml.MappingNode):
        _refuse_duplicates(node, at, file)
        loader.flatten_mapping(node)
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            found[key] = _plain(loader, value_node, (*at, key), origins, file)
            origins[(*at, key)] = Origin("file", f"{file}:{key_node.start_mark.line + 1}")
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*at, index), origins, file) for index, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def _refuse_duplicates(node: yaml.MappingNode, at: Path, file: str) -> None:
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in lines and key != "<<":
            name = ".".join(map(str, (*at, key)))
            raise ConfigError(f"{file}:{line}: {name} is set twice (first on line {lines[key]})")
        lines[key] = line


def _merge_files(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    """`_merge`, in which a name that stands for a section is one setting of it, so that the others of it stay."""
    for key, name in SHORTHANDS.items():
        both = (into.get(key), new.get(key))
        if any(isinstance(one, dict) for one in both) and any(isinstance(one, str) for one in both):
            into[key], value = ({name: one} if isinstance(one, str) else one for one in both)
            new = {**new, key: value}
    _merge(into, new)


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def parse_overrides(tokens: Iterable[str]) -> list[tuple[str, Any, str]]:
    """Command-line overrides as (dotted name, value, spelling).

    `a.b=value`, `--a.b value`, `--a.b=value`, `--flag` (true) and `--no-flag` (false) are all taken.
    """
    found: list[tuple[str, Any, str]] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.lstrip("-").partition("=")
        if not token.startswith("--"):
            if not equals or not name or token.startswith("-"):
                raise ConfigError(
                    f"'{token}': overrides look like train.learning_rate=2e-5 or --train.learning_rate 2e-5"
                )
            found.append((name, parse_value(text), token))
        elif equals:
            found.append((_dashes(name), parse_value(text), token))
        elif rest and (not rest[0].startswith("--")) and not _is_pair(rest[0]):
            value = rest.pop(0)
            found.append((_dashes(name), parse_value(value), f"{token} {value}"))
        elif name.startswith("no-"):
            found.append((_dashes(name[3:]), False, token))
        else:
            found.append((_dashes(name), True, token))
    return found


def _dashes(name: str) -> str:
    return name.replace("-", "_")


def _is_pair(token: str) -> bool:
    return re.match(r"^[A-Za-z_][\w.]*=", token) is not None
