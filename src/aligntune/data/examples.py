"""What is one training example? Every row format becomes one of these few shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aligntune.data.messages import Message


@dataclass(frozen=True, slots=True)
class TextExample:
    """Raw text; all of it is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class CompletionExample:
    """A raw prompt and its continuation, joined as they are (no chat template)."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation. `messages[:prompt_length]` are given; 0 says that the row makes no such cut."""

    messages: list[Message]
    prompt_length: int = 0
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class PairExample:
    """A prompt with a better and a worse answer: all three messages, or all three raw text."""

    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt to answer."""

    prompt: list[Message] | str
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text and its class, as the dataset writes it."""

    text: str
    label: Any


@dataclass(frozen=True, slots=True)
class TaggedExample:
    """Words and one tag for each."""

    tokens: list[str]
    tags: list[Any]


Example = TextExample | CompletionExample | ChatExample | PairExample | PromptExample | LabelledExample | TaggedExample
