"""Did the model call the right tools? Calls are read from messages or from the text forms that models write."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aligntune.errors import RewardError

from .base import adversarial, bad, good, reward
from .samples import Text, content_text
from .words import after_thinking, fenced_blocks

Call = tuple[str, Any]  # name and arguments; arguments that cannot be read stay as they are and match nothing
_TAGGED = re.compile(r"<(tool_call|function_call|tools?)>\s*(.*?)\s*</\1>", re.DOTALL)


def calls_of(completion: Text) -> list[Call]:
    """The tool calls of an answer, in order.

    From messages: `tool_calls`. From text: <tool_call>{"name", "arguments"}</tool_call>, a JSON object or list of them
    (bare or in a code block), or Python calls in a list: [f(x=1), g()].
    """
    if isinstance(completion, str):
        return list(_from_text(completion))
    calls: list[Call] = []
    for message in completion:
        if message.get("role", "assistant") != "assistant":
            continue
        made = message.get("tool_calls") or []
        calls += [call for item in made for call in _from_json(item)] if made else _from_text(content_text(message))
    return calls


def _from_text(text: str) -> Iterator[Call]:
    text = after_thinking(text)
    sources = [content for _, content in _TAGGED.findall(text)]
    sources = sources or [content for language, content in fenced_blocks(text) if language in ("json", "")] or [text]
    for source in sources:
        try:
            yield from _from_json(json.loads(source))
        except (ValueError, RecursionError):
            yield from _from_python(source)


def _from_json(value: Any) -> Iterator[Call]:
    if isinstance(value, list):
        for item in value:
            yield from _from_json(item)
    elif isinstance(value, Mapping):
        nested = value.get("function")
        call = nested if isinstance(nested, Mapping) else value
        if isinstance(call.get("name"), str):
            yield call["name"], _arguments(call.get("arguments", call.get("parameters")))


def _arguments(given: Any) -> Any:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return given
    if isinstance(given, Mapping):  # Arrow gives every dict of a column the keys of all of them
        return {key: value for key, value in given.items() if value is not None}
    return {} if given is None else given


def _from_python(source: str) -> Iterator[Call]:
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if isinstance(node, ast.Call) and not node.args:
            try:
                yield ast.unparse(node.func), {part.arg: ast.literal_eval(part.value) for part in node.keywords}
            except (ValueError, TypeError, RecursionError):
                continue


def _key(call: Call) -> str:
    return json.dumps([call[0], call[1]], sort_keys=True, default=repr)


def _wanted(expected: Any) -> list[Call]:
    value = json.loads(expected) if isinstance(expected, str) else expected
    calls = list(_from_json(value))
    if value and not calls:
        raise RewardError(f"tool_call_match: {expected!r:.200} holds no call with a name and arguments")
    return calls


WEATHER = [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]


@reward(
    "tool_call_match",
    range=(0, 1),
    aliases=["tool_calls"],
    examples=[
        good('<tool_call>{"name": "weather", "arguments": {"days": 2, "city": "Oslo"}}</tool_call>', tool_calls=WEATHER),
        good([{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}]}], tool_calls=WEATHER),
        bad('<tool_call>{"name": "weather", "arguments": {"city": "Rome", "days": 2}}</tool_call>', tool_calls=WEATHER),
        adversarial('[weather(city="Oslo", days=2), weather(city="Rome", days=2)]', 0.0, tool_calls=WEATHER, note="one call too many"),
        adversarial("I would call weather for Oslo, 2 days.", 0.0, tool_calls=WEATHER, note="talking about it"),
    ],
)  # fmt: skip
def tool_call_match(
    completions: list[Text], tool_calls: list[Any], *, ordered: bool = False, partial: bool = False
) -> list[float]:
    """1 if the calls are exactly the column's `tool_calls` (names and arguments), in any order unless `ordered`.

    `partial`: F1 of the calls that agree. Without expected calls, 1 if none is made.
    """
    scores = []
    for completion, expected in zip(completions, tool_calls, strict=True):
        made, wanted = [_key(call) for call in calls_of(completion)], [_key(call) for call in _wanted(expected)]
        if partial and (made or wanted):
            shared = (Counter(made) & Counter(wanted)).total()
            scores.append(2 * shared / (len(made) + len(wanted)))
        else:
            scores.append(float(made == wanted if ordered else sorted(made) == sorted(wanted)))
    return scores


PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip
WEATHER_TOOL = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "required": ["city"], "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}}}]  # fmt: skip


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    wanted = schema.get("type")
    if schema.get("enum") and value not in schema["enum"]:
        return False
    if wanted not in PYTHON_TYPES:
        return True
    return isinstance(value, PYTHON_TYPES[wanted]) and (wanted == "boolean" or not isinstance(value, bool))


def _call_fits(call: Call, tools: Mapping[str, Mapping[str, Any]]) -> bool:
    name, given = call
    if name not in tools or not isinstance(given, Mapping):
        return False
    parameters = tools[name].get("parameters") or {}
    known = {key: value for key, value in (parameters.get("properties") or {}).items() if value is not None}
    missing = [key for key in parameters.get("required") or [] if key not in given]
    return not missing and all(key in known and _fits(value, known[key]) for key, value in given.items())


@reward(
    "tool_call_format",
    range=(0, 1),
    examples=[
        good('<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>', tools=WEATHER_TOOL),
        bad('<tool_call>{"name": "weather", "arguments": {"days": 2}}</tool_call>', tools=WEATHER_TOOL),
        adversarial('<tool_call>{"name": "rm", "arguments": {"path": "/"}}</tool_call>', 0.0, tools=WEATHER_TOOL, note="no such tool"),
        adversarial('<tool_call>{"name": "weather", "arguments": {"city": ["Oslo"]}}</tool_call>', 0.0, tools=WEATHER_TOOL, note="the wrong type"),
    ],
)  # fmt: skip
def tool_call_format(completions: list[Text], tools: list[Any]) -> list[float]:
    """Share of the calls that fit a tool of the column `tools`: its name, required, known and rightly typed arguments.

    0 without any call. Types are checked one level deep.
    """
    scores = []
    for completion, declared in zip(completions, tools, strict=True):
        schemas = _schemas(declared)
        calls = calls_of(completion)
        scores.append(sum(_call_fits(call, schemas) for call in calls) / len(calls) if calls else 0.0)
    return scores


def _schemas(declared: Any) -> dict[str, Mapping[str, Any]]:
    tools: Sequence[Any] = json.loads(declared) if isinstance(declared, str) else declared
    functions = [tool.get("function") or tool for tool in tools]
    return {function["name"]: function for function in functions}
