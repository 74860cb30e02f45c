"""How are preference pairs and prompts for RL written? prompt/chosen/rejected, sharegpt pairs, HH transcripts, ranked lists.

A ranked list gives one pair a row: its best answer against its worst. (All pairs of a list would weigh long lists more and
repeat the same texts.) Rows with equal scores give equal answers and are dropped as such by the tokeniser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from aligntune.data.examples import Example, PairExample, PromptExample
from aligntune.data.formats import row_format
from aligntune.data.formats_sft import QUESTION, instruction_chat, is_messages, text_of, turns
from aligntune.data.messages import Message, read_messages, read_tools, with_system
from aligntune.errors import DataError

CHOSEN = {"chosen": ("chosen_response", "preferred", "accepted"), "rejected": ("rejected_response", "dispreferred")}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_transcript(value: Any) -> bool:
    """Whether a text is a transcript as in Anthropic's HH data."""
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in value


@row_format(
    "preference",
    kind="preference",
    needs=("chosen", "rejected"),
    may=("prompt", "tools", "system"),
    guess={"prompt": ("question", "query", "problem"), **CHOSEN},
)
def preference(chosen: Any, rejected: Any, prompt: Any = None, tools: Any = None, system: Any = None) -> Example:
    """prompt, chosen, rejected as text or messages; without a prompt, what both conversations begin with is the prompt."""
    schemas, system = read_tools(tools), text_of(system, "system")
    if prompt is None:
        return _implicit_prompt(chosen, rejected, system, schemas)
    if all(isinstance(value, str) and not is_messages(value) for value in (prompt, chosen, rejected)) and not system:
        return PairExample(prompt, chosen, rejected, schemas)
    before = turns(prompt, "user", "prompt")
    good, bad = turns(chosen, "assistant", "chosen"), turns(rejected, "assistant", "rejected")
    if before and good[1 : len(before) + 1] == before and good[0]["role"] == "system" and good[:1] == bad[:1]:
        before = [good[0], *before]  # both conversations have a system message in front of the prompt
    good, bad = _without(before, good, "chosen"), _without(before, bad, "rejected")
    return PairExample(with_system(before, system), good, bad, schemas)


@row_format(
    "alpaca_pairs",
    kind="preference",
    needs=("instruction", "chosen", "rejected"),
    may=("input", "context", "system", "tools"),
    beats=("preference", "hh"),
)
def alpaca_pairs(
    instruction: Any,
    chosen: Any,
    rejected: Any,
    input: Any = None,
    context: Any = None,
    system: Any = None,
    tools: Any = None,
) -> Example:
    """An instruction with an optional input, and two answers."""
    chat = instruction_chat(instruction, input or context, "", system, tools=tools)
    good, bad = turns(chosen, "assistant", "chosen"), turns(rejected, "assistant", "rejected")
    return PairExample(chat.messages[: chat.prompt_length], good, bad, chat.tools)


@row_format(
    "sharegpt_pairs",
    kind="preference",
    needs=("conversations", "chosen", "rejected"),
    may=("tools", "system"),
    beats=("preference",),
    looks=lambda parts: is_messages(parts["conversations"]),
)
def sharegpt_pairs(conversations: Any, chosen: Any, rejected: Any, tools: Any = None, system: Any = None) -> Example:
    """A conversation as {from, value} dicts, with chosen and rejected as one such dict each (or a list, or text)."""
    before = with_system(read_messages(conversations), text_of(system, "system"))
    good, bad = turns(chosen, "assistant", "chosen"), turns(rejected, "assistant", "rejected")
    return PairExample(before, good, bad, read_tools(tools))


@row_format(
    "hh",
    kind="preference",
    needs=("chosen", "rejected"),
    beats=("preference",),
    looks=lambda parts: is_transcript(parts["chosen"]),
)
def hh(chosen: Any, rejected: Any) -> Example:
    """Two transcripts of "\\n\\nHuman: ...\\n\\nAssistant: ..."; what both begin with is the prompt."""
    return _implicit_prompt(read_transcript(chosen), read_transcript(rejected), "", None)


@row_format(
    "ranked",
    kind="preference",
    needs=("prompt", "responses"),
    may=("scores", "ranks", "tools", "system"),
    guess={
        "prompt": ("question", "query", "instruction"),
        "responses": ("completions", "candidates", "answers"),
        "scores": ("rewards", "ratings"),
        "ranks": ("rank", "ranking"),
    },
    beats=("preference",),
)
def ranked(
    prompt: Any, responses: Any, scores: Any = None, ranks: Any = None, tools: Any = None, system: Any = None
) -> Example:
    """A prompt with several responses and scores (higher is better) or ranks (1 is best): the best against the worst."""
    given = scores if scores is not None else ranks
    if given is None:
        raise DataError("a ranked list needs 'scores' (higher is better) or 'ranks' (1 is best)")
    if not isinstance(given, Sequence) or any(not isinstance(value, int | float) or value != value for value in given):
        raise DataError(f"scores and ranks should be lists of numbers, got {given!r:.200}")
    values = given if scores is not None else [-rank for rank in given]
    if not isinstance(responses, Sequence) or isinstance(responses, str) or len(responses) < 2:
        raise DataError("responses should be a list of at least two answers")
    if len(values) != len(responses):
        raise DataError(f"{len(responses)} responses but {len(values)} scores or ranks")
    order = sorted(range(len(values)), key=lambda place: values[place])
    worst, best = order[0], order[-1]
    if values[worst] == values[best]:
        worst = best
    return preference(responses[best], responses[worst], prompt, tools, system)


def read_transcript(value: Any) -> list[Message]:
    """An HH transcript as messages. Raises `DataError` when it does not begin with a human turn."""
    if not is_transcript(value):
        raise DataError("a transcript should read '\\n\\nHuman: ...\\n\\nAssistant: ...'")
    pieces = _HH_TURN.split("\n\n" + value.lstrip("\n"))[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]


@row_format(
    "prompt",
    kind="prompt",
    needs=("prompt",),
    may=("tools", "system"),
    guess={"prompt": QUESTION},
    beats=("messages", "sharegpt", "instruction", "hh", "preference"),
)
def prompt_only(prompt: Any, tools: Any = None, system: Any = None) -> Example:
    """A prompt as text or messages."""
    schemas = read_tools(tools)
    if isinstance(prompt, str) and not is_messages(prompt) and not system:
        return PromptExample(prompt, schemas)
    return PromptExample(with_system(turns(prompt, "user", "prompt"), text_of(system, "system")), schemas)


@row_format(
    "instruction",
    kind="prompt",
    needs=("instruction",),
    may=("input", "context", "system", "tools"),
    beats=("hh", "preference"),
)
def instruction(
    instruction: Any, input: Any = None, context: Any = None, system: Any = None, tools: Any = None
) -> Example:
    """An instruction with an optional input (alpaca, dolly)."""
    chat = instruction_chat(instruction, input or context, "", system, tools=tools)
    return PromptExample(chat.messages[: chat.prompt_length], chat.tools)


@row_format(
    "messages",
    kind="prompt",
    needs=("messages",),
    may=("tools", "system"),
    guess={"messages": ("conversation", "dialog", "dialogue", "chat")},
    beats=("hh", "preference"),
    looks=lambda parts: is_messages(parts["messages"]),
)
def messages_prompt(messages: Any, tools: Any = None, system: Any = None) -> Example:
    """A conversation up to its last assistant turn."""
    return _up_to_answer(with_system(read_messages(messages), text_of(system, "system")), read_tools(tools))


@row_format(
    "sharegpt",
    kind="prompt",
    needs=("conversations",),
    may=("tools", "system"),
    beats=("preference", "hh"),
    looks=lambda parts: is_messages(parts["conversations"]),
)
def sharegpt_prompt(conversations: Any, tools: Any = None, system: Any = None) -> Example:
    """A conversation as {from, value} dicts up to its last assistant turn."""
    return messages_prompt(conversations, tools, system)


@row_format(
    "hh", kind="prompt", needs=("chosen",), beats=("preference",), looks=lambda parts: is_transcript(parts["chosen"])
)
def hh_prompt(chosen: Any) -> Example:
    """An HH transcript up to its last assistant turn."""
    return _up_to_answer(read_transcript(chosen), None)


@row_format("preference", kind="prompt", needs=("chosen", "rejected"))
def preference_prompt(chosen: Any, rejected: Any) -> Example:
    """What two conversations begin with."""
    pair = _implicit_prompt(chosen, rejected, "", None)
    return PromptExample(pair.prompt, pair.tools)


def _up_to_answer(messages: list[Message], tools: list[Any] | None) -> PromptExample:
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise DataError("the conversation has no message to answer")
    return PromptExample(messages[:end], tools)


def _without(before: list[Message], answer: list[Message], part: str) -> list[Message]:
    """`answer` without the prompt, where a dataset repeats it there."""
    size = len(before)
    if len(answer) > size and answer[:size] == before:
        answer = answer[size:]
    if before and answer and before[-1]["role"] == "user" and answer[0]["role"] in ("user", "system"):
        raise DataError(
            f"after a prompt that ends with the user, {part} begins with a message of {answer[0]['role']}: it should hold the "
            "answer alone, or repeat the prompt word for word"
        )
    return answer


def _implicit_prompt(chosen: Any, rejected: Any, system: str, tools: list[Any] | None) -> PairExample:
    """The pair whose prompt is the common beginning of two conversations, never beyond the last message of either."""
    if not isinstance(chosen, Sequence | Mapping) or isinstance(chosen, str):
        raise DataError("there is no prompt column, and chosen is not a conversation from which to take the prompt")
    good, bad = with_system(read_messages(chosen), system), with_system(read_messages(rejected), system)
    size, limit = 0, min(len(good), len(bad)) - 1
    while size < limit and good[size] == bad[size]:
        size += 1
    if size == 0:
        raise DataError("chosen and rejected do not begin with the same message, so there is no prompt")
    return PairExample(good[:size], good[size:], bad[size:], tools)
