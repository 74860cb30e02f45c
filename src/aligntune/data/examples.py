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


def prompt_and_reference(example: Example) -> tuple[list[Message] | str, str] | None:
    """What to ask for an example, and the answer to compare with; None for shapes without an answer.

    A conversation without a marked prompt is asked up to its last assistant turn.
    """
    if isinstance(example, CompletionExample):
        return example.prompt, example.completion
    if isinstance(example, PairExample):
        chosen = example.chosen
        return example.prompt, chosen if isinstance(chosen, str) else _said(chosen)
    if not isinstance(example, ChatExample):
        return None
    places = [place for place, message in enumerate(example.messages) if message["role"] == "assistant"]
    size = example.prompt_length or (places[-1] if places else 0)
    return (example.messages[:size], _said(example.messages[size:])) if size else None


def _said(messages: list[Message]) -> str:
    return "\n".join(str(message["content"]) for message in messages if message["role"] == "assistant")
