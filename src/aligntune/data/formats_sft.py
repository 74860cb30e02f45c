"""How are rows of supervised fine-tuning written? text, alpaca, dolly, sharegpt, messages, prompt_completion, labels, tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.data.examples import (
    ChatExample,
    CompletionExample,
    Example,
    LabelledExample,
    TaggedExample,
    TextExample,
)
from aligntune.data.formats import row_format
from aligntune.data.messages import Message, read_messages, read_tools, with_system
from aligntune.errors import DataError

QUESTION = ("question", "query", "problem", "prompt")
ANSWER = ("answer", "response", "completion", "solution")


def text_of(value: Any, part: str) -> str:
    """`value` if it is text; None counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{part} should be text, got {type(value).__name__}: {value!r:.200}")
    return value


def is_messages(value: Any) -> bool:
    """Whether a value looks like a list of messages (or its JSON text)."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{")
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


@row_format("text", kind="sft", needs=("text",), guess={"text": ("content", "document")})
def text(text: Any) -> Example:
    """Raw text."""
    return TextExample(text_of(text, "text"))


def instruction_chat(
    instruction: Any, extra: Any, answer: Any, system: Any = None, history: Any = None, tools: Any = None
) -> ChatExample:
    """One turn: the instruction, a blank line and the extra text (if any), then the answer."""
    messages: list[Message] = []
    for turn in history or []:
        is_pair = isinstance(turn, Sequence) and len(turn) == 2 and all(isinstance(said, str) for said in turn)
        if isinstance(turn, str) or not is_pair:
            raise DataError(f"history should be a list of [question, answer] pairs of text, got {turn!r:.200}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    parts = [text_of(instruction, "instruction"), text_of(extra, "input")]
    messages.append({"role": "user", "content": "\n\n".join(part for part in parts if part.strip())})
    messages = with_system(messages, text_of(system, "system"))
    if answer is None:
        raise DataError('the answer is empty (null); write "" if the model should answer nothing')
    answer_message = {"role": "assistant", "content": text_of(answer, "the answer")}
    return ChatExample([*messages, answer_message], prompt_length=len(messages), tools=read_tools(tools))


@row_format(
    "alpaca",
    kind="sft",
    needs=("instruction", "output"),
    may=("input", "context", "system", "history", "tools"),
    guess={"instruction": QUESTION, "output": ANSWER},
    beats=("text",),
)
def alpaca(
    instruction: Any,
    output: Any,
    input: Any = None,
    context: Any = None,
    system: Any = None,
    history: Any = None,
    tools: Any = None,
) -> Example:
    """instruction, input -> output, with an optional list of earlier [question, answer] pairs."""
    return instruction_chat(instruction, input or context, output, system, history, tools)


@row_format(
    "dolly",
    kind="sft",
    needs=("instruction", "response"),
    may=("context", "input", "system"),
    guess={"instruction": QUESTION},
    beats=("text",),
)
def dolly(instruction: Any, response: Any, context: Any = None, input: Any = None, system: Any = None) -> Example:
    """instruction, context -> response."""
    return instruction_chat(instruction, context or input, response, system)


@row_format(
    "messages",
    kind="sft",
    needs=("messages",),
    may=("tools", "system"),
    guess={"messages": ("conversation", "dialog", "dialogue", "chat")},
    beats=("text",),
    looks=lambda parts: is_messages(parts["messages"]),
)
def messages(messages: Any, tools: Any = None, system: Any = None) -> Example:
    """A list of {role, content}."""
    return ChatExample(with_system(read_messages(messages), text_of(system, "system")), tools=read_tools(tools))


@row_format(
    "sharegpt",
    kind="sft",
    needs=("conversations",),
    may=("tools", "system"),
    beats=("text",),
    looks=lambda parts: is_messages(parts["conversations"]),
)
def sharegpt(conversations: Any, tools: Any = None, system: Any = None) -> Example:
    """A list of {from, value}, with function calls and observations, in the column `conversations`."""
    return ChatExample(with_system(read_messages(conversations), text_of(system, "system")), tools=read_tools(tools))


@row_format("prompt_completion", kind="sft", needs=("prompt", "completion"), may=("tools", "system"), beats=("text",))
def prompt_completion(prompt: Any, completion: Any, tools: Any = None, system: Any = None) -> Example:
    """Both raw text, or both messages (either may then be text: one turn)."""
    if isinstance(prompt, str) and isinstance(completion, str) and not (is_messages(prompt) or system or tools):
        return CompletionExample(prompt, completion)
    before = with_system(turns(prompt, "user", "prompt"), text_of(system, "system"))
    after = turns(completion, "assistant", "completion")
    if not before:
        raise DataError("prompt has no messages; rows without a prompt are written as messages")
    return ChatExample([*before, *after], prompt_length=len(before), tools=read_tools(tools))


def turns(value: Any, role: str, part: str) -> list[Message]:
    """Messages as they are; a text as one message of `role`."""
    if isinstance(value, str) and not is_messages(value):
        return [{"role": role, "content": value}]
    if value is None:
        raise DataError(f"{part} is empty (null)")
    return read_messages([value] if isinstance(value, Mapping) else value)


@row_format(
    "classification",
    kind="classification",
    needs=("text", "label"),
    guess={
        "text": ("sentence", "content", "review", "document", "tweet"),
        "label": ("labels", "class", "category", "sentiment", "intent"),
    },
)
def classification(text: Any, label: Any) -> Example:
    """A text and its class."""
    return LabelledExample(text_of(text, "text"), label)


@row_format(
    "tagging",
    kind="tagging",
    needs=("tokens", "tags"),
    guess={"tokens": ("words",), "tags": ("ner_tags", "pos_tags", "labels")},
)
def tagging(tokens: Any, tags: Any) -> Example:
    """Words and one tag for each."""
    for part, value in (("tokens", tokens), ("tags", tags)):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise DataError(f"{part} should be a list, got {type(value).__name__}: {value!r:.200}")
    if len(tokens) != len(tags):
        raise DataError(f"{len(tokens)} tokens but {len(tags)} tags")
    if not all(isinstance(token, str) for token in tokens):
        raise DataError("tokens should be a list of text")
    return TaggedExample(list(tokens), list(tags))
