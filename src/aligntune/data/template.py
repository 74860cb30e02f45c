"""Which chat template is used, and which characters of a rendered conversation are the assistant's own?

The template is the tokenizer's; `use_template` sets another: a Jinja string, a file, or one that ships here. A tokenizer
without one gets `alpaca` for instruction rows and `plain` for conversations (both need no special tokens but
end-of-sequence), with one log line, so that the template is saved with the model.

Spans by prefix rendering. The assistant's turn i begins where `render(messages[:i], add_generation_prompt)` ends and ends
where `render(messages[:i+1])` ends: what the model has to write after the prompt it will see. Where a rendered beginning is
not a beginning of the whole (templates that drop earlier thinking, that write something only at the very end, that
have no generation prompt), the turn is found by rendering the whole again with a marker in its place; what stays the
same on both sides is not the turn. Whatever neither way explains is refused.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from aligntune.data.messages import THOUGHTS, Message
from aligntune.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MARK = "\ue0aaMARK\ue0ab"
"""Stands in for a message's content; private-use characters, so that no text begins or ends like it."""

CALL_ID = "a1b2c3d4e"
"""Of a tool call when a template is looked at: 9 letters and digits, as some ask for."""

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "function",
        "description": "description",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "string", "description": "a"}},
            "required": ["a"],
        },
    },
}
"""A tool with which a template is looked at."""


def shipped_templates() -> list[str]:
    """Names of the templates in this package."""
    folder = resources.files("aligntune.data") / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def find_template(chat_template: str) -> str:
    """The Jinja text of a template given as text, as a file, or by the name of a shipped one.

    Raises:
        ConfigError: it is none of these, or is not valid Jinja.
    """
    if "{{" in chat_template or "{%" in chat_template:
        text = chat_template
    elif Path(chat_template).is_file():
        text = Path(chat_template).read_text(encoding="utf-8")
    elif chat_template in shipped_templates():
        text = (resources.files("aligntune.data") / "templates" / f"{chat_template}.jinja").read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"chat_template {chat_template!r} is neither Jinja text, nor a file, nor a shipped template "
            f"({', '.join(shipped_templates())})"
        )
    return text


def use_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, *, fallback: str = "plain") -> None:
    """Give the tokenizer `chat_template`; with None, keep its own, or give it `fallback` when it has none."""
    if chat_template is not None:
        tokenizer.chat_template = find_template(chat_template)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = find_template(fallback)
        logger.warning(
            "the tokenizer has no chat template: using the shipped %r (set chat_template for another)", fallback
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """The characters [start, end) of a rendered conversation that the assistant wrote as message `index`."""

    index: int
    start: int
    end: int


class ChatTemplate:
    """A tokenizer's chat template with its arguments, and what can be learned about it by rendering.

    `enable_thinking`: True or False is passed to the template; True with a template that does not take it is an error.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, enable_thinking: bool | None = None) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self.source = "\n".join(own.values()) if isinstance(own, dict) else tokenizer.get_chat_template()
        self.arguments: dict[str, Any] = {}
        if re.search(r"\benable_thinking\b", self.source):
            self.arguments = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        elif enable_thinking:
            raise ConfigError("enable_thinking: this chat template has no thinking mode; remove the setting")

    def render(
        self,
        messages: list[Message],
        tools: list[Any] | None = None,
        *,
        generation_prompt: bool = False,
        continue_last: bool = False,
    ) -> str:
        """The text of a conversation. Raises `DataError` with the template's own words when it refuses the messages."""
        ending = {"add_generation_prompt": generation_prompt, "continue_final_message": continue_last}
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **ending, **self.arguments)
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error

    def prompt(self, messages: list[Message], tools: list[Any] | None = None) -> str:
        """The text after which the assistant writes. A conversation that ends with an assistant turn is continued."""
        messages = self._fit(messages, tools)
        if messages[-1]["role"] == "assistant":
            return self.render(messages, tools, continue_last=True)
        if self.has_generation_prompt:
            return self.render(messages, tools, generation_prompt=True)
        marked = self.render([*messages, _marked()], tools)
        before, mark, _ = marked.partition(MARK)
        if not mark:
            raise DataError("the chat template shows no assistant turn after these messages")
        return before.rstrip(" ")

    def turns(
        self, messages: list[Message], tools: list[Any] | None = None, *, since: int = 0
    ) -> tuple[str, list[Turn]]:
        """The rendered conversation and where each assistant turn stands in it, its end-of-turn token included.

        `since`: look only for turns of `messages[since:]`.

        Raises:
            DataError: the template refuses the messages, loses part of them, or hides where a turn begins or ends.
        """
        shown = self._fit(messages, tools)
        moved = len(messages) - len(shown)  # 1 when the system message went into the user's
        text = self.render(shown, tools)
        found: list[Turn] = []
        for index, message in enumerate(shown):
            if message["role"] != "assistant" or index + moved < since:
                continue
            start = self._start(text, shown, index, tools)
            end = self._end(text, shown, index, tools, start)
            self._check(text, message, start, end, found)
            found.append(Turn(index + moved, start, end))
        return self._closed(text, found) if shown[-1]["role"] == "assistant" else (text, found)

    # ------------------------------------------------------------------ boundaries of one turn

    def _start(self, text: str, messages: list[Message], index: int, tools: list[Any] | None) -> int:
        prefix = self._try(messages[:index], tools, generation_prompt=True)
        is_prefix = prefix is not None and text.startswith(prefix)
        # After another assistant turn some templates write no generation prompt.
        after_assistant = index > 0 and messages[index - 1]["role"] == "assistant"
        if is_prefix and self.has_generation_prompt and not after_assistant:
            return len(prefix or "")
        before, _ = self._around(messages, index, tools)
        if not text.startswith(before):
            raise DataError(f"the chat template hides where message {index} begins (its header changes with its text)")
        if is_prefix and not before[len(prefix or "") :].strip():
            return len(prefix or "")  # no header at all, only blanks: "[/INST] answer"
        return len(before)

    def _end(self, text: str, messages: list[Message], index: int, tools: list[Any] | None, start: int) -> int:
        if index == len(messages) - 1:
            last, own, _ = self.tails
            extra = len(last) - len(own) if text.endswith(last) else 0
            return self._without_blanks(text, start, len(text) - extra)
        upto = self._try(messages[: index + 1], tools)
        if upto is not None and text.startswith(upto):
            end = len(upto)
        else:
            _, after = self._around(messages, index, tools)
            if not text.endswith(after):
                raise DataError(f"the chat template hides where message {index} ends")
            end = len(text) - len(after) + self._common_tail(after)
        end = self._without_blanks(text, start, end)
        eos = self.tokenizer.eos_token
        ends_open = eos and not self._ends_special(text[start:end]) and text.startswith(eos, end)
        return end + len(eos) if ends_open else end

    def _around(self, messages: list[Message], index: int, tools: list[Any] | None) -> tuple[str, str]:
        """The text before and after turn `index` when its content is the marker."""
        marked = self.render([*messages[:index], _marked(), *messages[index + 1 :]], tools)
        before, mark, after = marked.partition(MARK)
        if not mark:
            raise DataError(f"the chat template does not show the text of message {index}")
        return before, after

    def _common_tail(self, after: str) -> int:
        """How many characters of `after` (what follows a turn in mid-conversation) still belong to the turn."""
        return next((len(tail) for tail in self.tails if tail and after.startswith(tail)), 0)

    def _without_blanks(self, text: str, start: int, end: int) -> int:
        """`end` without blanks after the end-of-turn token: the model stops at the token and never writes them."""
        stripped = text[start:end].rstrip()
        return start + len(stripped) if self._ends_special(stripped) else end

    def _check(self, text: str, message: Message, start: int, end: int, found: list[Turn]) -> None:
        """Refuse spans that overlap or do not hold the message's text (its reasoning aside, which templates move)."""
        answer = str(message["content"]).rpartition("</think>")[2].strip()
        if end > start and answer in text[start:end] and not (found and start < found[-1].end):
            return
        if answer not in text:
            raise DataError(f"the chat template does not show the assistant's text as it is: {answer!r:.200}")
        raise DataError(f"cannot tell which part of the rendered text is {answer!r:.80}; rendered as {text!r:.1000}")

    def _closed(self, text: str, found: list[Turn]) -> tuple[str, list[Turn]]:
        """With an end-of-sequence token after a last turn that the template leaves open, or nothing would teach to stop."""
        eos = self.tokenizer.eos_token
        if not found or not eos or self._ends_special(text.rstrip()):
            return text, found
        last = found[-1]
        text = text[: last.end] + eos
        return text, [*found[:-1], Turn(last.index, last.start, len(text))]

    def _try(self, messages: list[Message], tools: list[Any] | None, *, generation_prompt: bool = False) -> str | None:
        """The rendered text, or None when the template refuses this beginning of a conversation."""
        if not messages:
            return None
        try:
            return self.render(messages, tools, generation_prompt=generation_prompt)
        except DataError:
            return None

    # ------------------------------------------------------------------ what the template is like

    def _ends_special(self, text: str) -> bool:
        """Whether the last token of `text` is an added one."""
        return any(text[-size:] in self._special for size in self._special_sizes)

    @cached_property
    def _special(self) -> frozenset[str]:
        """Texts of the added tokens, which plain text never yields. Some tokenizers have thousands."""
        return frozenset(token for token in self.tokenizer.get_added_vocab() if token.strip())

    @cached_property
    def _special_sizes(self) -> list[int]:
        return sorted({len(token) for token in self._special})

    @cached_property
    def has_generation_prompt(self) -> bool:
        """Whether the template acts on `add_generation_prompt`."""
        question = [_user("question")]
        return self._try(question, None, generation_prompt=True) != self._try(question, None)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template shows a system message."""
        shown = self._try([{"role": "system", "content": MARK}, _user("question")], None)
        return shown is not None and MARK in shown

    @cached_property
    def hides_calls(self) -> bool:
        """Whether the template renders an assistant's tool calls away."""
        return self._hides([_user("question"), _call("MARK")])

    @cached_property
    def hides_results(self) -> bool:
        """Whether the template renders a tool's answer away."""
        result = {"role": "tool", "content": MARK, "name": "function", "tool_call_id": CALL_ID}
        question, answer = _user("question"), {"role": "assistant", "content": "answer"}
        return self._hides([question, _call("function"), result], [question, answer, result])

    @cached_property
    def hides_later_system(self) -> bool:
        """Whether the template renders a system message in mid-conversation away."""
        answer, system = {"role": "assistant", "content": "answer"}, {"role": "system", "content": MARK}
        return self._hides([_user("question"), answer, system, _user("question")])

    def _hides(self, *conversations: list[Message]) -> bool:
        """Whether the template takes one of these, with a tool or without, and shows the word MARK of none."""
        found = [self._try(messages, tools) for messages in conversations for tools in (None, [PROBE_TOOL])]
        shown = [text for text in found if text is not None]  # those refused will be refused in a row as well
        return bool(shown) and not any("MARK" in text for text in shown)

    @cached_property
    def tails(self) -> tuple[str, str, str]:
        """What follows the text of a turn: all that stands at the very end of a conversation; the end-of-turn text in it; and
        the end-of-turn text in mid-conversation.

        The first may add to the second, as in "<|end|>\\n<|endoftext|>". The last two are what the end and the middle have in
        common; where no token is, a conversation ends in its own way (gpt-oss: "<|return|>", and "<|end|>" between turns).
        """
        last = self._try([_user("question"), _marked()], None) or ""
        middle = self._try([_user("question"), _marked(), _user("question")], None) or ""
        last, middle = last.partition(MARK)[2], middle.partition(MARK)[2]
        common = _common_prefix(last, middle) if middle else last
        if common == last:
            return last, last, last
        if ends := self._special_ends(common):
            return last, common[: ends[-1]], common[: ends[-1]]
        if ends := self._special_ends(last):
            return last, last[: ends[0]], self._end_before_header(middle)
        return last, "", ""

    def _end_before_header(self, middle: str) -> str:
        """The end-of-turn token of `middle`: its first one, unless the header of a turn begins with that."""
        bare, asked = self._try([_user("question")], None), self._try([_user("question")], None, generation_prompt=True)
        header = (asked or "").removeprefix(bare or "")
        if not bare or header == asked or not header:
            return ""
        ends = self._special_ends(middle.partition("question")[0])
        return middle[: ends[0]] if len(ends) > 1 and not header.startswith(middle[: ends[0]]) else ""

    def _special_ends(self, text: str) -> list[int]:
        """Where the added tokens in `text` end."""
        return [end for end in range(1, len(text) + 1) if self._ends_special(text[:end])]

    # ------------------------------------------------------------------ what the template cannot show

    def _fit(self, messages: list[Message], tools: list[Any] | None) -> list[Message]:
        """The messages as this template can show them; refuses parts that it would drop without a word."""
        if not messages:
            raise DataError("the conversation is empty")
        if tools and not re.search(r"\btools\b", self.source):
            raise DataError("the row has tools, and the chat template has no place for them")
        for key in ("tool_calls", *THOUGHTS):
            if any(message.get(key) for message in messages) and not re.search(rf"[.'\"]{key}\b", self.source):
                raise DataError(f"a message has {key}, and the chat template does not show it")
        if any(message.get("tool_calls") for message in messages) and self.hides_calls:
            raise DataError("a message has tool_calls, and the chat template renders it without them")
        if any(message["role"] == "tool" for message in messages) and self.hides_results:
            raise DataError("the row has tool results, and the chat template does not show them")
        if any(message["role"] == "system" for message in messages[1:]) and self.hides_later_system:
            raise DataError(
                "the row has a system message after its first message, and the chat template does not show it"
            )
        return messages if self.takes_system else _system_in_user(messages)


def _system_in_user(messages: list[Message]) -> list[Message]:
    """For templates without a system role: the system text in front of the first user message, a blank line between."""
    if messages[0]["role"] != "system":
        return messages
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError("the chat template has no system role, and there is no user message to put the system text in")
    _say_once("the chat template has no system role: system texts go in front of the first user message")
    merged = {**messages[first], "content": f"{messages[0]['content']}\n\n{messages[first]['content']}"}
    return [*messages[1:first], merged, *messages[first + 1 :]]


def _common_prefix(one: str, other: str) -> str:
    size = next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:size]


@lru_cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _call(name: str) -> Message:
    call = {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": {"a": "b"}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _marked() -> Message:
    return {"role": "assistant", "content": MARK}
