"""What is wrong with a config? Problems are collected while it is resolved, and reported together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aligntune.config.enums import AlgorithmType
from aligntune.config.load import Origin
from aligntune.config.run import run_class, section_classes
from aligntune.config.synonyms import Path, groups, renames


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
class Work:
    """State of one resolution."""

    algorithm: AlgorithmType
    problems: list[Problem] = field(default_factory=list)
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, Origin] = field(default_factory=dict)
    written: dict[Path, Path] = field(default_factory=dict)
    """Canonical path -> the path that the user wrote."""

    def complain(self, path: Path, message: str, origin: Origin) -> None:
        self.problems.append(Problem(path, message, origin))


def nearest(origins: Mapping[Path, Origin], path: Path) -> Origin | None:
    """The origin of the path, or of the innermost part around it that has one."""
    return next((origins[path[:cut]] for cut in range(len(path), 0, -1) if path[:cut] in origins), None)


def places(algorithm: AlgorithmType, name: str) -> list[Path]:
    found: list[Path] = []
    for section, cls in section_classes(algorithm).items():
        if name in cls.model_fields or name in renames(algorithm)[section]:
            found.append((section, name))
    return found


def all_names(algorithm: AlgorithmType) -> list[str]:
    names = list(run_class(algorithm).model_fields)
    for section, cls in section_classes(algorithm).items():
        names += [*cls.model_fields, *renames(algorithm)[section]]
    return names


def is_dataset_settings(given: Mapping[Any, Any]) -> bool:
    """Whether these are settings of a dataset, and not a row, or the columns of one."""
    known = {"name", "dataset_name"}
    if known & set(given):
        return True
    for algorithm in (AlgorithmType.SFT, AlgorithmType.DPO):
        known |= {*section_classes(algorithm)["dataset"].model_fields, *renames(algorithm)["dataset"]}
    return known >= set(given)


def rename(algorithm: AlgorithmType, path: Path) -> Path:
    """The path with the field's own name in place of another spelling of it."""
    table_of = "dataset" if path[0] == "eval_dataset" else path[0]
    table = renames(algorithm).get(str(table_of), {})
    if len(path) >= 2 and path[1] in table:
        return (path[0], table[str(path[1])], *path[2:])
    return path


def canonical_path(algorithm: AlgorithmType, path: Path) -> Path:
    path = rename(algorithm, path)
    for group in groups(algorithm):
        if path in group.members:
            return group.canonical
    return path


def _place(problem: Problem) -> tuple[bool, str, int]:
    if problem.origin.kind != "file":
        return True, "", 0
    file, _, line = problem.origin.detail.rpartition(":")
    return False, file, int(line)


def short(value: object, limit: int = 120) -> str:
    """What was given, on one line; a long value is cut."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[:limit]}... ({type(value).__name__})"


def report(problems: list[Problem]) -> str:
    """All of them, once each: those of files by line, then the others as they were found."""
    lines = list(dict.fromkeys(str(problem) for problem in sorted(problems, key=_place)))
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} problems:\n" + "\n".join(f"  {line}" for line in lines)
