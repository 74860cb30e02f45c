"""What was meant by the names that were written? Sections, bare names and synonyms become entries under canonical names.

Each source (file, arguments, overrides) is one layer. Two synonyms of one layer that disagree are a problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from aligntune.config.base import Section
from aligntune.config.enums import AlgorithmType
from aligntune.config.load import SHORTHANDS, Entry, Layer, Origin
from aligntune.config.problems import Work, all_names, canonical_path, nearest, places, rename, short
from aligntune.config.rewards import RewardModelSourceConfig
from aligntune.config.rl import SampleLoggingConfig
from aligntune.config.run import run_class, section_classes
from aligntune.config.synonyms import BACKEND_FLAGS, Group, Path, dataset_groups, groups
from aligntune.config.words import suggest

NESTED: dict[Path, type[Section]] = {
    ("logging", "sample_logging"): SampleLoggingConfig,
    ("model", "reward_model_source"): RewardModelSourceConfig,
}
"""Settings that are sections themselves and are given part by part."""


def file_layer(work: Work, data: Mapping[str, Any], inside: dict[Path, Origin]) -> Layer:
    """A nested dict as entries; a file's lines are kept for messages."""
    layer = Layer(inside=inside)
    for key, value in data.items():
        _nested_entries(work, layer, (key,), value, lambda path: nearest(inside, path) or Origin("argument", "config"))
    return layer


def is_section(work: Work, path: Path) -> bool:
    """Whether `path` holds settings by name."""
    return path in NESTED or (len(path) == 1 and path[0] in {*section_classes(work.algorithm), "eval_dataset"})


def _nested_entries(work: Work, layer: Layer, path: Path, value: Any, origin_of: Any) -> None:
    section = is_section(work, path)
    if isinstance(value, BaseModel) and section:
        value = {name: getattr(value, name) for name in value.model_fields_set}
    if section and path[0] in SHORTHANDS and len(path) == 1 and isinstance(value, (str, os.PathLike)):
        value = {SHORTHANDS[str(path[0])]: os.fspath(value)}
    if not section or value is None:
        if value is not None or not section:
            layer.entries.append(Entry(path, _without_arrays(value), origin_of(path)))
        return
    if not isinstance(value, Mapping):
        work.complain(path, f"should hold settings by name, got {short(value)}", origin_of(path))
        return
    for name, part in value.items():
        _nested_entries(work, layer, (*path, str(name)), part, origin_of)


def _without_arrays(value: Any) -> Any:
    """Numbers and lists of an array library (numpy, torch) as Python's own."""
    if type(value) in (list, tuple):
        return [_without_arrays(item) for item in value]
    if type(value) is dict:
        return {key: _without_arrays(item) for key, item in value.items()}
    return value.tolist() if isinstance(getattr(value, "ndim", None), int) and hasattr(value, "tolist") else value


def flat_layer(work: Work, pairs: Iterable[tuple[str, Any, str]], kind: str) -> Layer:
    """Arguments or overrides: dotted paths, sections as dicts, or bare names that belong to one place."""
    layer = Layer()
    for name, value, spelling in pairs:
        origin = Origin(kind, spelling)
        path = _find(work, name, origin)
        if value is None and path is not None and is_section(work, path):
            layer.entries.append(Entry(path, None, origin))  # takes back what an earlier layer says of it
        elif path is not None:
            _nested_entries(work, layer, path, value, lambda _path, origin=origin: origin)
    return layer


def _find(work: Work, name: str, origin: Origin) -> Path | None:
    """The path that a dotted or bare name means, or None with a problem noted."""
    if "." in name:
        parts = name.split(".")
        is_list = parts[0] in ("rewards", "datasets")
        return tuple(int(part) if is_list and part.isdigit() else part for part in parts)
    if name in run_class(work.algorithm).model_fields:
        return (name,)
    if name in ("rewards", "datasets"):
        return (name,)
    candidates = places(work.algorithm, name)
    joined = {canonical_path(work.algorithm, path) for path in candidates}
    if len(joined) == 1:
        return candidates[0]
    if candidates:
        work.complain(
            (name,),
            f"is in several sections: say {' or '.join('.'.join(map(str, path)) for path in candidates)}",
            origin,
        )
    else:
        work.complain((name,), f"is not a setting{suggest(name, all_names(work.algorithm))}", origin)
    return None


def canonical_entry(work: Work, at: Path, given: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    """One of `datasets` under canonical names, as `canonical` makes them of whole layers."""
    found: dict[Path, Entry] = {}
    for name, value in given.items():
        path = (*at, *rename(work.algorithm, ("dataset", name))[1:])
        entry = Entry((*at, name), value, origin)
        if path in found and found[path].value != value:
            _conflict(work, found[path], found[path].path, entry)
        found.setdefault(path, entry)
    found = {path: Entry(path, entry.value, entry.origin) for path, entry in found.items()}
    for group in dataset_groups(work.algorithm, at):
        _join(work, group, found)
    return {str(path[-1]): entry.value for path, entry in found.items()}


def canonical(work: Work, layer: Layer) -> Layer:
    """The layer under canonical names; two synonyms of one layer that disagree are a problem."""
    found: dict[Path, Entry] = {}
    for entry in layer.entries:
        path = rename(work.algorithm, entry.path)
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
    for group in dataset_groups(work.algorithm, ("eval_dataset",)):
        _join(work, group, found)
    return Layer(list(found.values()), layer.inside)


def _conflict(work: Work, first: Entry, first_path: Path, second: Entry) -> None:
    one, other = ".".join(map(str, first_path)), ".".join(map(str, second.path))
    if one == other:
        message = f"is given twice: {short(first.value)} ({first.origin}), then {short(second.value)}; keep one"
    else:
        message = (
            f"is {short(second.value)}, but its synonym {one} is {short(first.value)} ({first.origin}); "
            f"keep one of {one} and {other}"
        )
    work.complain(second.path, message, second.origin)


def _backend_flag(work: Work, found: dict[Path, Entry], entry: Entry, backend: str) -> None:
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


def _join(work: Work, group: Group, found: dict[Path, Entry]) -> None:
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


def shown_as(algorithm: AlgorithmType, path: Path, value: Any) -> Iterable[tuple[Path, Any]]:
    """The path and its synonyms, each with what it shows for `value`."""
    yield path, value
    for group in groups(algorithm):
        if path == group.canonical:
            yield from ((member, group.shown(member, value)) for member in group.members if member != path)
