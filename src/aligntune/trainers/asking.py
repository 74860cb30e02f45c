"""How is a user's own text put to the policy? As the run's prompts are: by template, system prompt and tools, or raw."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from aligntune.config.rl import DatasetConfig
from aligntune.data.messages import Message, read_tools, with_system
from aligntune.data.pairs import asked_of
from aligntune.data.template import ChatTemplate
from aligntune.data.tokenize import RawEnds

Prompt = str | list[Message]


class Asker:
    """`rows` are prompts of `tokenize_prompts`: the first one tells whether prompts are conversations."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: DatasetConfig, rows: Any, enable_thinking: bool | None
    ) -> None:
        self.tokenizer, self.source, self.thinking = tokenizer, source, enable_thinking
        self.chats = not isinstance(asked_of(rows[0]), str)

    def __call__(self, prompt: Prompt) -> tuple[Prompt, list[int]]:
        """(what is asked, tokens). A text is a user message where prompts are conversations."""
        if isinstance(prompt, str) and not self.chats:
            return prompt, [*RawEnds.of(self.tokenizer).before, *self._encode(prompt)]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = with_system(messages, self.source.system_prompt)
        template = ChatTemplate(self.tokenizer, enable_thinking=self.thinking)
        return messages, self._encode(template.prompt(messages, read_tools(self.source.tools)))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
