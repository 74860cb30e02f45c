"""Which value holds? Layers of settings become one validated run, with the origin of every value.

Precedence: reference defaults < YAML file < function arguments < command-line overrides. All problems are reported
together. After this step every setting has one name and one value; nothing downstream reads YAML, arguments or argv.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from aligntune.config import applies, derive, live
from aligntune.config.base import Section
from aligntune.config.enums import AlgorithmType
from aligntune.config.load import Entry, Layer, Origin, parse_overrides, read_yaml
from aligntune.config.rewards import RewardConfig, RewardModelSourceConfig, RewardModelTrainingConfig
from aligntune.config.rl import SampleLoggingConfig
from aligntune.config.run import RLRunConfig, SFTRunConfig, run_class, section_classes
from aligntune.config.synonyms import BACKEND_FLAGS, Group, Path, groups, renames
from aligntune.errors import ConfigError

NESTED: dict[Path, type[Section]] = {
    ("logging", "sample_logging"): SampleLoggingConfig,
    ("model", "reward_model_source"): RewardModelSourceConfig,
}
"""Settings that are sections themselves and are given part by part."""

LISTS = ("datasets", "rewards")


@dataclass
class Resolved:
    """A run and where each of its values comes from."""

    config: SFTRunConfig | RLRunConfig
    origins: dict[Path, Origin]
    explicit: dict[str, Any]
    """What was set or derived, under canonical names: enough to run again."""

    def rows(self) -> list[tuple[str, Any, str]]:
        """(dotted path, value, origin) of every setting, in the order of the reference."""
        return list(_rows(self.config, (), self.origins))

    def origin(self, *path: str) -> Origin:
        return self.origins.get(path, Origin("default"))


@dataclass
class Problem:
    path: Path
    message: str
    origin: Origin

    def __str__(self) -> str:
        where = f"{self.origin}: " if self.origin.kind != "default" else ""
        name = ".".join(map(str, self.path))
        return f"{where}{name + ': ' if name else ''}{self.message}"


@dataclass
class _Work:
    """State of one resolution."""

    algorithm: AlgorithmType
    problems: list[Problem] = field(default_factory=list)
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, Origin] = field(default_factory=dict)
    written: dict[Path, Path] = field(default_factory=dict)
    """Canonical path -> the path that the user wrote."""

    def complain(self, path: Path, message: str, origin: Origin) -> None:
        self.problems.append(Problem(path, message, origin))


def resolve(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    algorithm: str | AlgorithmType | None = None,
) -> Resolved:
    """Resolve a config file (or nested dict), keyword arguments and overrides into one run.

    `algorithm` is what the door says (`create_sft_trainer` says sft); it must agree with a config that says one too.
    Raises `ConfigError` with all problems, each with its file and line or argument.
    """
    data, inside = _read(source)
    pairs = parse_overrides(overrides)
    work = _Work(_algorithm(data, inside, arguments or {}, pairs, algorithm))
    for layer in (
        _file_layer(work, data, inside),
        _flat_layer(work, [(name, value, name) for name, value in (arguments or {}).items()], "argument"),
        _flat_layer(work, pairs, "override"),
    ):
        _apply(work, _canonical(work, layer))
    _refuse_what_cannot_act(work)
    config = _validate(work)
    if config is None or work.problems:
        raise ConfigError(_report(work.problems))
    for path, value, why in derive.derived(config):
        for same_path, shown in _shown(work.algorithm, path, value):
            derive.assign(config, same_path, shown)
            work.origins[same_path] = Origin("derived", f"({why})")
            _set(work.tree, same_path, shown)
    if problems := [
        Problem(path, message, work.origins.get(path, Origin("default")))
        for path, message in derive.contradictions(config)
    ]:
        raise ConfigError(_report(problems))
    return Resolved(config, work.origins, work.tree)


def _read(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[Path, Origin]]:
    if source is None:
        return {}, {}
    if isinstance(source, Mapping):
        return dict(source), {}
    return read_yaml(source)


def _algorithm(
    data: Mapping[str, Any], inside: Mapping[Path, Origin], arguments: Mapping[str, Any],
    overrides: Sequence[tuple[str, Any, str]], door: str | AlgorithmType | None,
) -> AlgorithmType:  # fmt: skip
    said: list[tuple[Any, Origin]] = []
    if "algorithm" in data:
        said.append((data["algorithm"], inside.get(("algorithm",), Origin("argument", "config"))))
    if "algorithm" in arguments:
        said.append((arguments["algorithm"], Origin("argument", "algorithm")))
    said += [(value, Origin("override", spelling)) for name, value, spelling in overrides if name == "algorithm"]
    try:
        found = AlgorithmType.parse(said[-1][0]) if said else None
    except ValueError as error:
        raise ConfigError(_report([Problem(("algorithm",), f"{error}, got {said[-1][0]!r}", said[-1][1])])) from None
    expected = AlgorithmType.parse(door) if door is not None else None
    if found is None and expected is None:
        names = ", ".join(member.value for member in AlgorithmType)
        raise ConfigError(f"algorithm: is required, one of {names}")
    if found is not None and expected is not None and found is not expected:
        raise ConfigError(f"{said[-1][1]}: algorithm: is {found.value}, but this trainer runs {expected.value}")
    return found or expected  # type: ignore[return-value]


# Layers ---------------------------------------------------------------------------------------------------------------


def _file_layer(work: _Work, data: Mapping[str, Any], inside: dict[Path, Origin]) -> Layer:
    """A nested dict as entries; a file's lines are kept for messages."""
    layer = Layer(inside=inside)
    for key, value in data.items():
        _nested_entries(work, layer, (key,), value, lambda path: _nearest(inside, path) or Origin("argument", "config"))
    return layer


def _nearest(origins: Mapping[Path, Origin], path: Path) -> Origin | None:
    """The origin of the path, or of the innermost part around it that has one."""
    return next((origins[path[:cut]] for cut in range(len(path), 0, -1) if path[:cut] in origins), None)


def _nested_entries(work: _Work, layer: Layer, path: Path, value: Any, origin_of: Any) -> None:
    sections = {*section_classes(work.algorithm), "eval_dataset"}
    is_section = path in NESTED or (len(path) == 1 and path[0] in sections)
    if isinstance(value, BaseModel) and is_section:
        value = {name: getattr(value, name) for name in value.model_fields_set}
    if (
        is_section
        and path[0] in ("dataset", "eval_dataset", "model")
        and len(path) == 1
        and isinstance(value, (str, os.PathLike))
    ):
        leaf = "name_or_path" if path[0] == "model" else "name"
        value = {leaf: os.fspath(value)}
    if not is_section or value is None:
        if value is not None or not is_section:
            layer.entries.append(Entry(path, value, origin_of(path)))
        return
    if not isinstance(value, Mapping):
        work.complain(path, f"should hold settings by name, got {value!r}", origin_of(path))
        return
    for name, part in value.items():
        _nested_entries(work, layer, (*path, str(name)), part, origin_of)


def _flat_layer(work: _Work, pairs: Iterable[tuple[str, Any, str]], kind: str) -> Layer:
    """Arguments or overrides: dotted paths, sections as dicts, or bare names that belong to one place."""
    layer = Layer()
    for name, value, spelling in pairs:
        origin = Origin(kind, spelling)
        path = _find(work, name, origin)
        if path is not None:
            _nested_entries(work, layer, path, value, lambda _path, origin=origin: origin)
    return layer


def _find(work: _Work, name: str, origin: Origin) -> Path | None:
    """The path that a dotted or bare name means, or None with a problem noted."""
    if "." in name:
        return tuple(int(part) if part.isdigit() else part for part in name.split("."))
    if name in run_class(work.algorithm).model_fields:
        return (name,)
    if name in ("rewards", "datasets"):
        return (name,)
    candidates = _places(work.algorithm, name)
    joined = {_canonical_path(work.algorithm, path) for path in candidates}
    if len(joined) == 1:
        return candidates[0]
    if candidates:
        work.complain(
            (name,),
            f"is in several sections: say {' or '.join('.'.join(map(str, path)) for path in candidates)}",
            origin,
        )
    else:
        work.complain((name,), f"is not a setting{_suggest(name, _all_names(work.algorithm))}", origin)
    return None


def _places(algorithm: AlgorithmType, name: str) -> list[Path]:
    found: list[Path] = []
    for section, cls in section_classes(algorithm).items():
        if name in cls.model_fields or name in renames(algorithm)[section]:
            found.append((section, name))
    return found


def _all_names(algorithm: AlgorithmType) -> list[str]:
    names = list(run_class(algorithm).model_fields)
    for section, cls in section_classes(algorithm).items():
        names += [*cls.model_fields, *renames(algorithm)[section]]
    return names


def _suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.7)
    return f": did you mean {prefix}{close[0]}?" if close else ""


# Synonyms -------------------------------------------------------------------------------------------------------------


def _rename(algorithm: AlgorithmType, path: Path) -> Path:
    """The path with the field's own name in place of another spelling of it."""
    table_of = "dataset" if path[0] == "eval_dataset" else path[0]
    table = renames(algorithm).get(str(table_of), {})
    if len(path) >= 2 and path[1] in table:
        return (path[0], table[str(path[1])], *path[2:])
    return path


def _canonical_path(algorithm: AlgorithmType, path: Path) -> Path:
    path = _rename(algorithm, path)
    for group in groups(algorithm):
        if path in group.members:
            return group.canonical
    return path


def _canonical(work: _Work, layer: Layer) -> Layer:
    """The layer under canonical names; two synonyms of one layer that disagree are a problem."""
    found: dict[Path, Entry] = {}
    for entry in layer.entries:
        path = _rename(work.algorithm, entry.path)
        if path in found and found[path].value != entry.value:
            _conflict(work, found[path], work.written.get(path, path), entry)
            continue
        found[path] = Entry(path, entry.value, entry.origin)
        work.written[path] = entry.path
    for path, backend in BACKEND_FLAGS.items():
        if path in found:
            _backend_flag(work, found, found[path], backend)
    for group in groups(work.algorithm):
        _join(work, group, found)
    return Layer(list(found.values()), layer.inside)


def _conflict(work: _Work, first: Entry, first_path: Path, second: Entry) -> None:
    one, other = ".".join(map(str, first_path)), ".".join(map(str, second.path))
    message = (
        f"is {second.value!r}, but its synonym {one} is {first.value!r} ({first.origin}); keep one of {one} and {other}"
    )
    work.complain(second.path, message, second.origin)


def _backend_flag(work: _Work, found: dict[Path, Entry], entry: Entry, backend: str) -> None:
    if not isinstance(entry.value, bool):
        return
    named = found.get(("backend",))
    if entry.value:
        if named is not None and str(named.value).lower() not in (backend, "auto"):
            _conflict(work, named, ("backend",), Entry(entry.path, entry.value, entry.origin))
        found[("backend",)] = Entry(("backend",), backend, entry.origin)
    elif named is not None and str(named.value).lower() == backend:
        _conflict(work, named, ("backend",), Entry(entry.path, entry.value, entry.origin))
    else:
        skipped = found.get(("skip_backends",), Entry(("skip_backends",), [], entry.origin))
        if backend not in skipped.value:
            found[("skip_backends",)] = Entry(("skip_backends",), [*skipped.value, backend], entry.origin)


def _comparable(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _join(work: _Work, group: Group, found: dict[Path, Entry]) -> None:
    """Move what the group's members say to the canonical path, and show it in the others."""
    present = [found[path] for path in group.members if path in found]
    if not present:
        return
    readings = [(entry, group.members[entry.path](entry.value)) for entry in present]
    definite = [(entry, reading.value) for entry, reading in readings if reading.value is not None]
    ruled_out = {value: entry for entry, reading in readings for value in reading.rules_out}
    if definite:
        winner, value = definite[0]
        for entry, other in definite[1:]:
            if _comparable(other) != _comparable(value):
                _conflict(work, winner, work.written.get(winner.path, winner.path), entry)
                return
        if isinstance(value, str) and value.lower() in ruled_out and value.lower() != "auto":
            _conflict(work, winner, work.written.get(winner.path, winner.path), ruled_out[value.lower()])
            return
    elif ruled_out and group.otherwise is not None:
        section, name = str(group.canonical[0]), str(group.canonical[1])
        default = section_classes(work.algorithm)[section].model_fields[name].default
        if str(default) not in ruled_out:
            return
        winner, value = next(iter(ruled_out.values())), group.otherwise
    else:
        return
    for path in group.members:
        shown = value if path == group.canonical else group.shown(path, value)
        if shown is not None:
            found[path] = Entry(path, shown, winner.origin)
            work.written[path] = work.written.get(winner.path, winner.path)


def _shown(algorithm: AlgorithmType, path: Path, value: Any) -> Iterable[tuple[Path, Any]]:
    """The path and its synonyms, each with what it shows for `value`."""
    yield path, value
    for group in groups(algorithm):
        if path == group.canonical:
            yield from ((member, group.shown(member, value)) for member in group.members if member != path)


# The tree -------------------------------------------------------------------------------------------------------------


def _apply(work: _Work, layer: Layer) -> None:
    for entry in layer.entries:
        _set(work.tree, entry.path, entry.value)
        work.origins[entry.path] = entry.origin
    for path, origin in layer.inside.items():
        work.origins.setdefault(path, origin)


def _set(tree: Any, path: Path, value: Any) -> None:
    for part in path[:-1]:
        if isinstance(tree, list):
            tree = tree[int(part)]
        else:
            if tree.get(part) is None:
                tree[part] = {}
            tree = tree[part]
    tree[int(path[-1]) if isinstance(tree, list) else path[-1]] = value


def _refuse_what_cannot_act(work: _Work) -> None:
    for section in ("model", "dataset", "train", "evaluation", "logging"):
        for name in work.tree.get(section, {}):
            path = (section, name)
            origin = work.origins.get(path, Origin("default"))
            written = work.written.get(path, path)
            if _rename(work.algorithm, written) != path:
                continue  # shown by a group: the name that was written is judged instead
            message = applies.refusal(work.algorithm, section, str(written[-1])) or applies.refusal(
                work.algorithm, section, name
            )
            message = message or live.refusal(work.algorithm, path, work.tree[section][name])
            if message:
                work.complain(written, message, origin)


# Validation -----------------------------------------------------------------------------------------------------------


def _validate(work: _Work) -> SFTRunConfig | RLRunConfig | None:
    tree = dict(work.tree)
    tree["algorithm"] = work.algorithm
    parts: dict[str, Any] = {}
    classes = section_classes(work.algorithm)
    for section, cls in classes.items():
        if section == "dataset" and "dataset" not in tree:
            continue
        parts[section] = _build(work, cls, tree.pop(section, {}), (section,))
    if "eval_dataset" in tree:
        parts["eval_dataset"] = _build(
            work, classes["dataset"], _inherit(tree.pop("eval_dataset"), work.tree), ("eval_dataset",)
        )
    for name in LISTS:
        if name in tree:
            parts[name] = _build_list(
                work, classes["dataset"] if name == "datasets" else RewardConfig, tree.pop(name), (name,)
            )
    if tree.get("reward_training") is not None:
        parts["reward_training"] = _build(
            work, RewardModelTrainingConfig, tree.pop("reward_training"), ("reward_training",)
        )
    if "dataset" not in work.tree and not work.tree.get("datasets"):
        work.complain(("dataset", "name"), "is required: a file, folder or hub dataset", Origin("default"))
    failed = tuple(name for name, part in parts.items() if part is None or (isinstance(part, list) and None in part))
    return _build(work, run_class(work.algorithm), tree | parts, (), skip=failed)


def _inherit(given: Any, tree: Mapping[str, Any]) -> Any:
    """An evaluation dataset has the settings of `dataset` that it does not give itself."""
    if not isinstance(given, dict):
        return given
    own = ("name", "split", "percent", "max_samples", "subset", "config_name")
    base = {key: value for key, value in tree.get("dataset", {}).items() if key not in own or "name" not in given}
    return base | given


def _build(work: _Work, cls: type[Section], data: Any, at: Path, skip: tuple[str, ...] = ()) -> Any:
    """An instance of `cls`, or None with its problems noted; `skip` names parts whose problems are noted already."""
    if isinstance(data, cls):
        return data
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if detail["loc"] and detail["loc"][0] in skip:
                continue
            path = (*at, *_setting_path(detail["loc"]))
            work.complain(path, _explain(work, cls, detail), _nearest(work.origins, path) or Origin("default"))
        return None


def _build_list(work: _Work, cls: type[Section], data: Any, at: Path) -> list[Any]:
    if not isinstance(data, (list, tuple)):
        work.complain(at, f"should be a list, got {data!r}", _nearest(work.origins, at) or Origin("default"))
        return []
    if cls is RewardConfig:
        items = [item if isinstance(item, (dict, RewardConfig)) else {"type": item} for item in data]
    else:
        items = [{"name": item} if isinstance(item, str) else item for item in data]
        table = renames(work.algorithm)["dataset"]
        items = [
            {table.get(key, key): value for key, value in item.items()} if isinstance(item, dict) else item
            for item in items
        ]
    return [_build(work, cls, item, (*at, index)) for index, item in enumerate(items)]


def _setting_path(loc: tuple[str | int, ...]) -> Path:
    """pydantic's location without the names of union branches."""
    return tuple(part for part in loc if not (isinstance(part, str) and not part.replace("_", "a").isidentifier()))


PLAIN_TYPES = {
    "int_type": "should be a whole number", "int_from_float": "should be a whole number", "float_type": "should be a number",
    "bool_type": "should be true or false", "string_type": "should be text", "list_type": "should be a list",
    "dict_type": "should hold settings by name", "model_type": "should hold settings by name", "missing": "is required",
}  # fmt: skip


def _explain(work: _Work, cls: type[Section], detail: Any) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        return "is not a setting" + _where_instead(work, cls, name)
    if kind == "missing":
        return "is required"
    text = PLAIN_TYPES.get(kind) or detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text if kind == "value_error" and not text.startswith("should") else f"{text}, got {value!r}"


def _where_instead(work: _Work, cls: type[Section], name: str) -> str:
    own = [*cls.model_fields]
    for section, section_class in section_classes(work.algorithm).items():
        if section_class is cls:
            own += renames(work.algorithm)[section]
    for path in _places(work.algorithm, name):
        return f" here: say {'.'.join(map(str, path))}"
    return _suggest(name, own) or _suggest(name, _all_names(work.algorithm))


def _report(problems: list[Problem]) -> str:
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines)


def _rows(section: Section, at: Path, origins: Mapping[Path, Origin]) -> Iterable[tuple[str, Any, str]]:
    for name in type(section).model_fields:
        value, path = getattr(section, name), (*at, name)
        if isinstance(value, Section):
            yield from _rows(value, path, origins)
        elif isinstance(value, list) and value and all(isinstance(item, Section) for item in value):
            for index, item in enumerate(value):
                yield from _rows(item, (*path, index), origins)
        else:
            origin = origins.get(path)
            nearest = next(
                (
                    origins[path[:cut]]
                    for cut in range(len(path) - 1, 1, -1)
                    if path[:cut] in origins and at and at[0] in LISTS
                ),
                None,
            )
            is_set = name in section.model_fields_set
            yield ".".join(map(str, path)), value, str(origin or (nearest if is_set and nearest else Origin("default")))
