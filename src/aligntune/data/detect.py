"""Which format are these rows in, and how is a row read?

The format is the one that `format_type` names, else the one whose columns are all there. Where several match, a format
that finds its columns under their own names is preferred to one that guessed them, and structured formats to plain text;
what is then still ambiguous is an error that shows the columns and the formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

from aligntune.config import rl, sft
from aligntune.config.enums import TaskType
from aligntune.config.row_formats import TASK_FORMATS
from aligntune.data import formats_rl as _formats_rl  # noqa: F401  (registers its formats)
from aligntune.data import formats_sft as _formats_sft  # noqa: F401
from aligntune.data.examples import ChatExample, CompletionExample, Example, PairExample, PromptExample
from aligntune.data.formats import Kind, RowFormat, describe, find_format, formats_of
from aligntune.data.messages import read_tools, show_row, with_system
from aligntune.data.sources import called, column_names
from aligntune.errors import ConfigError, DataError

COLUMN_SETTINGS = {
    "text": "text_column",
    "instruction": "instruction_column",
    "response": "response_column",
    "output": "output_column",
    "input": "input_column",
    "context": "context_column",
    "label": "label_column",
    "tokens": "tokens_column",
    "tags": "tags_column",
    "messages": "messages_column",
}
"""Part of a row -> the SFT dataset setting that names its column."""


@dataclass(frozen=True)
class Reading:
    """How the rows of one dataset are to be read: the settings of either `DatasetConfig`, in one shape."""

    dataset: str
    """What messages call it."""
    kind: Kind
    allowed: tuple[str, ...]
    format_type: str | None = None
    auto: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    as_chat: bool = False
    system_prompt: str | None = None
    tools: Any = None

    @classmethod
    def of(cls, config: sft.DatasetConfig | rl.DatasetConfig, kind: Kind) -> Reading:
        """The reading that a config asks for. For an SFT config the task decides, and `kind` is not looked at."""
        if isinstance(config, sft.DatasetConfig):
            return cls._of_sft(config)
        return cls(
            called(config),
            kind,
            tuple(formats_of(kind)),
            config.format_type,
            config.auto_detect_fields,
            as_chat=config.task_type == "conversation",
            system_prompt=config.system_prompt,
            tools=config.tools,
        )

    @classmethod
    def _of_sft(cls, config: sft.DatasetConfig) -> Reading:
        task = config.task_type
        kind: Kind = "sft"
        if task is TaskType.TEXT_CLASSIFICATION:
            kind = "classification"
        elif task is TaskType.TOKEN_CLASSIFICATION:
            kind = "tagging"
        given = {part for part, setting in COLUMN_SETTINGS.items() if config.is_set(setting)}
        return cls(
            called(config),
            kind,
            TASK_FORMATS[task],
            config.format_type,
            config.auto_detect_fields,
            {part: getattr(config, setting) for part, setting in COLUMN_SETTINGS.items()},
            frozenset(given),
            as_chat=task in (TaskType.INSTRUCTION_FOLLOWING, TaskType.CHAT_COMPLETION),
            system_prompt=config.system_prompt,
        )

    def column(self, part: str) -> str:
        """The configured column of a part."""
        return self.columns.get(part, part)

    def find(self, row_format: RowFormat, available: list[str]) -> dict[str, str]:
        """Part -> column, for the parts that are there."""
        found: dict[str, str] = {}
        for part in row_format.parts:
            names = [self.column(part)]
            if self.auto and part not in self.given:
                names += row_format.guess.get(part, ())
            column = next((name for name in names if name in available and name not in found.values()), None)
            if column is not None:
                found[part] = column
        return found


@dataclass(frozen=True)
class RowReader:
    """Turns a row (a dict) into an example: `reader(row, index)`. Errors show the row."""

    row_format: RowFormat
    columns: Mapping[str, str]
    reading: Reading

    def __call__(self, row: Mapping[str, Any], index: int | None = None) -> Example:
        try:
            parts = {part: row[column] for part, column in self.columns.items()}
            return self._finish(self.row_format.read(**parts))
        except DataError as error:
            raise row_error(error, row, index, self) from None

    def key(self) -> dict[str, Any]:
        """What decides how rows are read, for a cache key."""
        reading = self.reading
        return {
            "format": [self.row_format.kind, self.row_format.name],
            "columns": dict(self.columns),
            "as_chat": reading.as_chat,
            "system_prompt": reading.system_prompt,
            "tools": reading.tools,
        }

    def _finish(self, example: Example) -> Example:
        system, tools = self.reading.system_prompt, self.reading.tools
        if self.reading.as_chat:
            example = as_chat(example)
        if isinstance(example, ChatExample):
            messages = with_system(example.messages, system)
            added = len(messages) - len(example.messages) if example.prompt_length else 0
            return ChatExample(messages, example.prompt_length + added, example.tools or read_tools(tools))
        if isinstance(example, PromptExample) and not isinstance(example.prompt, str):
            return PromptExample(with_system(example.prompt, system), example.tools or read_tools(tools))
        if isinstance(example, PairExample) and not isinstance(example.prompt, str):
            prompt = with_system(example.prompt, system)  # type: ignore[arg-type]
            return PairExample(prompt, example.chosen, example.rejected, example.tools or read_tools(tools))
        if system or tools:
            what = "system_prompt" if system else "tools"
            raise ConfigError(
                f"{what} needs conversations, and these rows are raw text; use a task_type that renders rows through the "
                "chat template, or remove it"
            )
        return example


def row_reader(
    rows: Dataset | IterableDataset, config: sft.DatasetConfig | rl.DatasetConfig, kind: Kind = "sft"
) -> RowReader:
    """The reader for `rows`: the format that the config names, or the one found from the columns and the first row.

    Raises:
        ConfigError: an unknown format, or one that the task does not use.
        DataError: a column is missing, or no format, or more than one, fits the columns.
    """
    reading = Reading.of(config, kind)
    first: dict[str, Any] = next(iter(rows), {})
    available = column_names(rows)
    try:
        if reading.format_type is not None:
            return _named(reading, available)
        return _detected(reading, available, first)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{reading.dataset}: {error}") from None


def _named(reading: Reading, available: list[str]) -> RowReader:
    chosen = find_format(str(reading.format_type), reading.kind)
    if chosen.name not in reading.allowed:
        raise ConfigError(
            f"format_type {chosen.name!r} does not fit the task, which reads: {', '.join(reading.allowed)}"
        )
    columns = reading.find(chosen, available)
    missing = [part for part in chosen.parts if part not in columns and (part in chosen.needs or part in reading.given)]
    if missing:
        raise _missing(reading, chosen, missing, available)
    _all_given_used(reading, chosen)
    return RowReader(chosen, columns, reading)


def _detected(reading: Reading, available: list[str], first: Mapping[str, Any]) -> RowReader:
    formats = {name: entry for name, entry in formats_of(reading.kind).items() if name in reading.allowed}
    used = {part for entry in formats.values() for part in entry.parts}
    absent = [part for part in sorted(reading.given & used) if reading.column(part) not in available]
    if absent:
        raise DataError(
            "; ".join(f"{COLUMN_SETTINGS[part]} is {reading.column(part)!r}" for part in absent)
            + f", but the dataset has no such column. Its columns are: {', '.join(available)}"
        )
    matches = []
    for entry in formats.values():
        columns = reading.find(entry, available)
        fits = all(part in columns for part in entry.needs) and reading.given & used <= set(entry.parts)
        if fits and entry.looks({part: first.get(column) for part, column in columns.items()}):
            matches.append(RowReader(entry, columns, reading))
    return _best(reading, matches, available)


def _best(reading: Reading, matches: list[RowReader], available: list[str]) -> RowReader:
    exact = [
        match for match in matches
        if all(match.columns[part] == reading.column(part) for part in match.row_format.needs)
    ]  # fmt: skip
    matches = exact or matches
    beaten = {name for match in matches for name in match.row_format.beats}
    left = [match for match in matches if match.row_format.name not in beaten]
    if len(left) == 1:
        _all_given_used(reading, left[0].row_format)
        return left[0]
    known = {name: entry for name, entry in formats_of(reading.kind).items() if name in reading.allowed}
    columns = f"columns: {', '.join(available)}"
    if left:
        names = " and ".join(match.row_format.name for match in left)
        raise DataError(f"the rows fit several formats, {names} ({columns}); set format_type to one of them")
    raise DataError(
        f"no known format fits the rows ({columns}); the formats here are: {describe(known)}. "
        + ("Set format_type and the *_column settings" if reading.columns else "Set format_type")
        + ", rename columns with column_mapping"
        + ("" if reading.auto else ", or set auto_detect_fields: true to look under other usual names")
        + _other_tasks(reading, available)
    )


def _other_tasks(reading: Reading, available: list[str]) -> str:
    """A hint when the rows fit a format that the task does not read."""
    others = [
        entry.name for name, entry in formats_of(reading.kind).items()
        if name not in reading.allowed and all(reading.column(part) in available for part in entry.needs)
    ]  # fmt: skip
    return f". The rows look like {' or '.join(others)}, which this task_type does not read" if others else ""


def _missing(reading: Reading, chosen: RowFormat, missing: list[str], available: list[str]) -> DataError:
    wanted = ", ".join(f"{part} (column {reading.column(part)!r})" for part in missing)
    return DataError(f"format {chosen.name} needs {wanted}; the columns are: {', '.join(available)}")


def _all_given_used(reading: Reading, chosen: RowFormat) -> None:
    unused = sorted(COLUMN_SETTINGS[part] for part in reading.given - set(chosen.parts))
    if unused:
        raise ConfigError(f"{', '.join(unused)} has no effect: the rows are read as {chosen.name}")


def as_chat(example: Example) -> Example:
    """Raw prompts as one user turn, raw answers as one assistant turn; other shapes as they are."""
    if isinstance(example, CompletionExample):
        return ChatExample([_user(example.prompt), _assistant(example.completion)], prompt_length=1)
    if isinstance(example, PairExample) and isinstance(example.prompt, str):
        chosen, rejected = _assistant(str(example.chosen)), _assistant(str(example.rejected))
        return PairExample([_user(example.prompt)], [chosen], [rejected], example.tools)
    if isinstance(example, PromptExample) and isinstance(example.prompt, str):
        return PromptExample([_user(example.prompt)], example.tools)
    return example


def row_error(error: Exception, row: Mapping[str, Any], index: int | None, reader: RowReader) -> DataError:
    """A `DataError` that says which row of which dataset and format is wrong, and shows it."""
    place = "a row" if index is None else f"row {index}"
    return DataError(f"{reader.reading.dataset}: {place} ({reader.row_format.name}): {error}\n{show_row(row)}")


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
