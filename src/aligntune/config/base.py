"""What is a setting? The base class of every section, and the small types that settings are made of.

A section is strict: an unknown name, a value of another type, or a number out of range is an error. Words are
matched in any case and with '-' for '_'. The docstring under a field is its documentation everywhere: in
`docs/reference.md`, in the JSON schema that editors read, and in error messages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import core_schema

from aligntune.config.words import not_among, plain_word


class Section(BaseModel):
    """One table of the parameter reference."""

    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, validate_assignment=True, protected_namespaces=()
    )

    def is_set(self, name: str) -> bool:
        """Whether the user gave `name` a value (set is different from default)."""
        return name in self.model_fields_set


@dataclass(frozen=True)
class LoraSettings:
    """LoRA under one set of names, whichever side (SFT or RL) it was set on."""

    rank: int
    alpha: int
    dropout: float
    target_modules: list[str] | str | None
    """None: the library's choice for the architecture."""
    strict_targets: bool
    """Whether a missing target module is an error (it is when the user named it)."""
    bias: str = "none"


class Choice(StrEnum):
    """An enum that takes its members, their values or their names, in any case."""

    @classmethod
    def parse(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            word = plain_word(value)
            for member in cls:
                if word in (plain_word(member.value), plain_word(member.name)):
                    return member
            extra = cls.also().get(word.replace("_", ""))
            if extra is not None:
                return cls(extra)
        raise ValueError(not_among(value, (member.value for member in cls)))

    @classmethod
    def also(cls) -> dict[str, str]:
        """Further spellings, without '_', of the members' values."""
        return {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {"type": "string", "enum": [member.value for member in cls]}


class OneOf:
    """Metadata of a string setting with a closed list of values: `Annotated[str, OneOf("none", "all")]`."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def match(self, value: object) -> str:
        if isinstance(value, str):
            for word in self.words:
                if plain_word(word) == plain_word(value):
                    return word
        raise ValueError(not_among(value, self.words))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.match)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {"type": "string", "enum": list(self.words)}


def _path_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _not_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("should not be empty")
    if "\0" in value:
        raise ValueError("should not hold the character NUL")
    return value


def _dict_or_empty(value: object) -> object:
    return {} if value is None else value


def _callable_or_path(value: object) -> object:
    if callable(value):
        return value
    if isinstance(value, str) and ":" in value:
        return value
    raise ValueError("should be a callable, 'module:function' or 'file.py:function'")


def _callback(value: object) -> object:
    if hasattr(value, "on_step_end") or (isinstance(value, str) and ":" in value):
        return value
    raise ValueError("should be a TrainerCallback of transformers, a class of it, 'module:Class' or 'file.py:Class'")


Text = Annotated[str, BeforeValidator(_path_text)]
"""A string; path objects are accepted."""

Settings = Annotated[dict[str, Any], BeforeValidator(_dict_or_empty)]
"""Keyword arguments passed on to another library; null means none."""

Named = Annotated[str, BeforeValidator(_path_text), AfterValidator(_not_empty)]
"""A name or path that is not empty."""

Function = Annotated[Any, BeforeValidator(_callable_or_path)]
"""A callable, or its address: 'module:function' or 'file.py:function'."""

Callback = Annotated[Any, BeforeValidator(_callback)]
"""A `TrainerCallback` of transformers, its class, or the address of that: 'module:Class' or 'file.py:Class'."""

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""As large as numpy's generators take."""
Number = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(gt=0, le=100)]
