"""Which row formats are known? A format is one function with a decorator that names the parts of a row it reads.

    @row_format("alpaca", kind="sft", needs=("instruction", "output"), may=("input",))
    def alpaca(instruction, output, input=None): ...

A part is found in the column of the same name, in the column that a `*_column` setting names, or, with
`auto_detect_fields`, under one of the part's other usual names (`guess`). The function gets each part by name and returns
an `Example`; it raises `DataError` for a row it cannot read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aligntune.config.row_formats import RL_FORMATS
from aligntune.config.words import plain_word
from aligntune.data.examples import Example
from aligntune.errors import ConfigError

Kind = Literal["sft", "classification", "tagging", "preference", "prompt"]


@dataclass(frozen=True)
class RowFormat:
    """One way to write a row. `needs` and `may` are parts; `beats` are formats it is preferred to when both match."""

    name: str
    kind: Kind
    read: Callable[..., Example]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    guess: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beats: tuple[str, ...] = ()
    looks: Callable[[Mapping[str, Any]], bool] = lambda parts: True

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.needs, *self.may)

    def __reduce__(self) -> tuple[Any, ...]:
        """As its name and its reader, whose module registers it where it is loaded: a worker of a stream that was not forked."""
        return _registered, (self.kind, self.name, self.read)


FORMATS: dict[tuple[Kind, str], RowFormat] = {}


def _registered(kind: Kind, name: str, _read: Callable[..., Example]) -> RowFormat:
    return FORMATS[kind, name]


def row_format(
    name: str,
    *,
    kind: Kind,
    needs: tuple[str, ...],
    may: tuple[str, ...] = (),
    guess: Mapping[str, tuple[str, ...]] | None = None,
    beats: tuple[str, ...] = (),
    looks: Callable[[Mapping[str, Any]], bool] = lambda parts: True,
) -> Callable[[Callable[..., Example]], Callable[..., Example]]:
    """Register a row format. `looks` sees the parts of the first row and says whether their values fit."""

    def register(read: Callable[..., Example]) -> Callable[..., Example]:
        if name not in RL_FORMATS.get(kind, [name]):
            RL_FORMATS[kind].append(name)
        FORMATS[kind, name] = RowFormat(name, kind, read, needs, may, guess or {}, beats, looks)
        return read

    return register


def formats_of(kind: Kind) -> dict[str, RowFormat]:
    """The formats of one kind, by name."""
    return {name: entry for (of_kind, name), entry in FORMATS.items() if of_kind == kind}


def find_format(name: str, kind: Kind) -> RowFormat:
    """The format called `name` (case, '-' and ' ' do not matter).

    Raises:
        ConfigError: no format of this kind has that name.
    """
    known = formats_of(kind)
    word = plain_word(name)
    if word not in known:
        raise ConfigError(f"format_type {name!r} is not a format for {kind} rows; the formats are: {describe(known)}")
    return known[word]


def describe(formats: Mapping[str, RowFormat]) -> str:
    """The formats with the columns they need, for messages: `alpaca (instruction, output), ...`."""
    return ", ".join(f"{entry.name} ({', '.join(entry.needs)})" for entry in formats.values())
