"""What did who say? One shape for chat messages, whatever the dataset calls its roles and keys.

A message is a dict as chat templates take it: `role` (system, user, assistant, tool), `content` (str), and where there are
any `tool_calls` (arguments as dicts), `reasoning_content`, `name`, `tool_call_id`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from aligntune.errors import DataError

Message = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatbot": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "function_call",
}  # fmt: skip
"""Role names in datasets -> the role that chat templates know. `function_call` is an assistant turn that calls tools."""

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which chat templates look for what the assistant thought before its answer."""


def read_messages(value: Any) -> list[Message]:
    """Messages from a list of {role, content} or {from, value} dicts, or from the JSON text of such a list.

    Raises:
        DataError: the value is no such list, a role is unknown, or a content is neither text nor text parts.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, "messages")
    if not isinstance(value, Sequence) or isinstance(value, str):
        also = "" if isinstance(value, str) else "text or "
        raise DataError(f"expected {also}a list of messages, got {type(value).__name__}: {value!r:.200}")
    return [read_message(item) for item in value]


def read_message(item: Any) -> Message:
    """One message; see `read_messages`."""
    if not isinstance(item, Mapping):
        raise DataError(f"expected a message with role and content, got {type(item).__name__}: {item!r}")
    role_key = _first_given(item, "role", "from")
    content_key = _first_given(item, "content", "value")
    if role_key not in item:
        raise DataError(f"a message needs 'role' and 'content' (or 'from' and 'value'); this one has {sorted(item)}")
    role = ROLES.get(str(item[role_key]).lower())
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(f"unknown role {item[role_key]!r} (known: {known}); rename it with processing_fn")
    content = item.get(content_key)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(_json(content, "a function_call"))}
    calls = item.get("tool_calls") or item.get("function_call")
    if content is None and not calls and not any(item.get(key) for key in THOUGHTS):
        raise DataError(f"a message of {role} has no content (null); its keys are: {', '.join(map(str, item))}")
    message: Message = {"role": role, "content": _content(content)}
    for key, entry in item.items():
        if entry is not None and key not in (role_key, content_key, "tool_calls", "function_call"):
            message[key] = drop_nulls(entry)
    if calls:
        message["tool_calls"] = _calls(calls)
    return message


def read_tools(value: Any) -> list[Any] | None:
    """Tool schemas from a list or its JSON text, each wrapped as {"type": "function", ...}; None when there are none.

    A function becomes the schema of its type hints and Google-style docstring.
    """
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else None
    if not value:
        return None
    if isinstance(value, Mapping) or callable(value):
        value = [value]
    if not isinstance(value, Sequence):
        raise DataError(f"tools should be a list of schemas, got {type(value).__name__}: {value!r:.200}")
    return [_tool(tool) for tool in value]


def drop_nulls(value: Any) -> Any:
    """Without dict entries that are None: Arrow gives every dict of a column the keys of all of them."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(entry) for key, entry in value.items() if entry is not None}
    return [drop_nulls(entry) for entry in value] if isinstance(value, list) else value


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """`messages` with a system message in front, unless they have one."""
    if not system_prompt or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def show_row(row: Mapping[str, Any], width: int = 300) -> str:
    """The row as short text for error messages, one column a line."""
    lines = []
    for column, value in row.items():
        text = repr(value)
        lines.append(f"  {column}: {text if len(text) <= width else text[:width] + ' ...'}")
    return "\n".join(lines)


def _first_given(item: Mapping[str, Any], key: str, other: str) -> str:
    """`key`, or `other` where only that has a value. (Arrow gives every dict of a column the keys of all of them.)"""
    return other if item.get(key) is None and (item.get(other) is not None or key not in item) else key


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    raise DataError(f"the content of a message should be text, got {type(content).__name__}: {content!r:.200}")


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as {"type": "function", "function": {"name", "arguments": dict}}, from any of the usual spellings."""
    calls = []
    value = _json(value, "tool_calls")
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence):
        raise DataError(f"tool calls should be a list of {{name, arguments}}, got {value!r:.200}")
    for entry in entries:
        call = drop_nulls(entry)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise DataError(f"a tool call needs 'name' and 'arguments', got {entry!r:.200}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments, "the arguments of a tool call") if arguments.strip() else {}
        extra = {key: call[key] for key in ("id",) if key in call}
        calls.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _tool(tool: Any) -> Any:
    if callable(tool):
        try:
            return get_json_schema(tool)
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise DataError(f"tools: {error} Each parameter needs a type hint and a line under 'Args:'.") from None
    tool = drop_nulls(_json(tool, "a tool"))
    return {"type": "function", "function": tool} if isinstance(tool, Mapping) and "function" not in tool else tool


def _json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} should be JSON ({error}): {value!r:.200}") from None
