"""What is scored? Prompts and completions as strings or message lists, with the dataset's columns beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from aligntune.errors import RewardError

Message = Mapping[str, Any]
Text = str | Sequence[Message]  # a plain text, or a conversation


def completion_text(completion: Text) -> str:
    """The text that is judged: a string itself, of messages the last one of the assistant."""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    return content_text(said[-1]) if said else ""


def prompt_text(prompt: Text) -> str:
    """The text that was asked: a string itself, of messages the last one of the user."""
    if isinstance(prompt, str):
        return prompt
    asked = [message for message in prompt if message.get("role") == "user"]
    return content_text(asked[-1]) if asked else ""


def content_text(message: Message) -> str:
    """A message's content as text; parts that are not text (images, audio) are left out."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))


def conversation(prompt: Text, completion: Text) -> list[Message]:
    """Prompt and completion as one list of messages."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return [*before, *after]


@dataclass(frozen=True)
class Batch:
    """N samples. `columns` holds lists of length N; `completion_ids` the completions' token ids, where there are any."""

    prompts: Sequence[Text]
    completions: Sequence[Text]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    completion_ids: Sequence[Sequence[int]] | None = None
    tokenizer: Any = None

    def __post_init__(self) -> None:
        sized = {"prompts": self.prompts, **self.columns}
        if self.completion_ids is not None:
            sized["completion_ids"] = self.completion_ids
        for name, values in sized.items():
            if isinstance(values, str) or len(values) != len(self.completions):
                size = 1 if isinstance(values, str) else len(values)
                raise RewardError(
                    f"{name} has {size} entries for {len(self.completions)} completions: give one for each completion"
                )

        for name, texts in (("prompts", self.prompts), ("completions", self.completions)):
            for place, text in enumerate(texts):
                if not isinstance(text, str | Sequence):
                    raise RewardError(f"{name}, row {place}: {text!r} is neither a text nor a list of messages")

    def __len__(self) -> int:
        return len(self.completions)

    @cached_property
    def prompt_texts(self) -> list[str]:
        return [prompt_text(prompt) for prompt in self.prompts]

    @cached_property
    def completion_texts(self) -> list[str]:
        return [completion_text(completion) for completion in self.completions]

    @cached_property
    def conversations(self) -> list[list[Message]]:
        return [conversation(*pair) for pair in zip(self.prompts, self.completions, strict=True)]

    def excerpt(self, index: int, width: int = 300) -> str:
        """Sample `index` for an error message or a log line."""
        texts = {"prompt": self.prompt_texts[index], "completion": self.completion_texts[index]}
        lines = [f"  {name}: {text[:width]!r}{' ...' if len(text) > width else ''}" for name, text in texts.items()]
        return "\n".join([f"sample {index} of {len(self)}:", *lines])
