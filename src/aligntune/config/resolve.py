"""Which value holds? Layers of settings become one validated run, with the origin of every value.

Precedence: reference defaults < YAML file < function arguments < command-line overrides. All problems are reported
together. After this step every setting has one name and one value; nothing downstream reads YAML, arguments or argv.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligntune.config import applies, derive
from aligntune.config.base import Section
from aligntune.config.contradictions import contradictions
from aligntune.config.enums import AlgorithmType
from aligntune.config.layers import canonical, file_layer, flat_layer, is_section, shown_as
from aligntune.config.load import Layer, Origin, parse_overrides, read_yaml
from aligntune.config.problems import Problem, Work, rename, report, short
from aligntune.config.run import RLRunConfig, RunConfig, SFTRunConfig
from aligntune.config.synonyms import Path, mirrors
from aligntune.config.validate import LISTS, validate
from aligntune.errors import ConfigError


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

    def counts(self) -> tuple[int, int]:
        """How many settings were given, and how many derived from them; one that has several names counts once."""
        origins = {path: origin for path, _, origin in self.rows() if origin != "default"}
        for path, named in mirrors(self.config.algorithm, len(self.config.datasets)):
            if any(".".join(map(str, name)) in origins for name in named):
                origins.pop(".".join(map(str, path)), None)
        derived = sum(origin.startswith("derived ") for origin in origins.values())
        return len(origins) - derived, derived

    def origin(self, *path: str) -> Origin:
        return self.origins.get(path, Origin("default"))


def resolve(
    source: str | os.PathLike[str] | Mapping[str, Any] | RunConfig | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    algorithm: str | AlgorithmType | None = None,
) -> Resolved:
    """Resolve a config file (or nested dict, or another run's config), keyword arguments and overrides into one run.

    `algorithm` is what the door says (`create_sft_trainer` says sft); it must agree with a config that says one too.
    Raises `ConfigError` with all problems, each with its file and line or argument.
    """
    data, inside = _read(source)
    pairs = parse_overrides(overrides)
    work = Work(_algorithm(data, inside, arguments or {}, pairs, algorithm))
    for layer in (
        file_layer(work, data, inside),
        flat_layer(work, [(name, value, name) for name, value in (arguments or {}).items()], "argument"),
        flat_layer(work, pairs, "override"),
    ):
        _apply(work, canonical(work, layer))
    _refuse_what_cannot_act(work)
    config = validate(work)
    if config is None or work.problems:
        raise ConfigError(report(work.problems))
    for path, value, why in derive.derived(config):
        for same_path, shown in shown_as(work.algorithm, path, value):
            derive.assign(config, same_path, shown)
            work.origins[same_path] = Origin("derived", f"({why})")
            _set(work.tree, same_path, shown)
    if problems := [
        Problem(path, message, work.origins.get(path, Origin("default"))) for path, message in contradictions(config)
    ]:
        raise ConfigError(report(problems))
    return Resolved(config, work.origins, work.tree)


def _read(source: object) -> tuple[dict[str, Any], dict[Path, Origin]]:
    if source is None:
        return {}, {}
    if isinstance(source, Mapping):
        return dict(source), {}
    if isinstance(source, RunConfig):
        return {name: getattr(source, name) for name in type(source).model_fields if source.is_set(name)}, {}
    if isinstance(source, (str, os.PathLike)):
        return read_yaml(source)
    raise ConfigError(f"config: should be a YAML file, settings by name, or the config of a run, got {short(source)}")


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
        raise ConfigError(report([Problem(("algorithm",), f"{error}, got {said[-1][0]!r}", said[-1][1])])) from None
    expected = AlgorithmType.parse(door) if door is not None else None
    if found is None and expected is None:
        names = ", ".join(member.value for member in AlgorithmType)
        raise ConfigError(f"algorithm: is required, one of {names}")
    if found is not None and expected is not None and found is not expected:
        raise ConfigError(f"{said[-1][1]}: algorithm: is {found.value}, but this trainer runs {expected.value}")
    return found or expected  # type: ignore[return-value]


def _apply(work: Work, layer: Layer) -> None:
    for entry in layer.entries:
        if entry.value is None and is_section(work, entry.path):
            _take_back(work, entry.path)
            continue
        try:
            _set(work.tree, entry.path, entry.value)
        except (TypeError, IndexError, ValueError):
            outer = ".".join(map(str, entry.path[:-1]))
            work.complain(
                entry.path, f"cannot be set: {outer} does not hold settings by name, or has no such entry", entry.origin
            )
            continue
        work.origins[entry.path] = entry.origin
    for path, origin in layer.inside.items():
        work.origins.setdefault(path, origin)


def _take_back(work: Work, section: Path) -> None:
    """Forget all that earlier layers say of `section`: it is as if it had not been written."""
    outer: Any = work.tree
    for part in section[:-1]:
        outer = outer.get(part) or {}
    outer.pop(section[-1], None)
    for path in [path for path in work.origins if path[: len(section)] == section]:
        del work.origins[path]


def _set(tree: Any, path: Path, value: Any) -> None:
    for part in path[:-1]:
        if isinstance(tree, list):
            tree = tree[int(part)]
        else:
            if tree.get(part) is None:
                tree[part] = {}
            tree = tree[part]
    tree[int(path[-1]) if isinstance(tree, list) else path[-1]] = value


def _refuse_what_cannot_act(work: Work) -> None:
    for section in ("model", "dataset", "train", "evaluation", "logging"):
        for name in work.tree.get(section, {}):
            path = (section, name)
            origin = work.origins.get(path, Origin("default"))
            written = work.written.get(path, path)
            if rename(work.algorithm, written) != path:
                continue  # shown by a group: the name that was written is judged instead
            message = applies.refusal(work.algorithm, section, str(written[-1])) or applies.refusal(
                work.algorithm, section, name
            )
            if message:
                work.complain(written, message, origin)


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
