"""Does the answer have the form that was asked for? Checked exactly; what it says is another reward's matter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from aligntune.errors import ConfigError, RewardError, require

from . import answers
from .base import adversarial, bad, good, reward
from .words import after_thinking, fenced_blocks, paragraphs, words


@reward(
    "think_format",
    range=(0, 1),
    source="DeepSeek-R1, arXiv 2501.12948 (format reward)",
    examples=[
        good("<think>48 / 2 = 24</think>\nShe sold 24."),
        bad("She sold 24."),
        adversarial("<think></think>24", 0.0, note="thinking nothing"),
        adversarial("<think>a</think><think>b</think>24", 0.0, note="thinking twice"),
    ],
)
def think_format(completion: str, *, tag: str = "think") -> float:
    """1 for one non-empty <think>...</think> at the start, followed by a non-empty answer without such tags."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    text = completion.strip()
    if not text.startswith(opening) or text.count(opening) != 1 or text.count(closing) != 1:
        return 0.0
    thought, _, answer = text[len(opening) :].partition(closing)
    return float(bool(thought.strip()) and bool(answer.strip()))


@reward(
    "xml_format",
    range=(0, 1),
    examples=[
        good("<reasoning>\n2 + 2\n</reasoning>\n<answer>\n4\n</answer>"),
        bad("The answer is 4"),
        adversarial("<answer>4</answer><reasoning>2 + 2</reasoning>", 0.0, note="the wrong order"),
        adversarial("<reasoning>x</reasoning><answer>4</answer> or 5?", 0.0, note="text outside the tags"),
    ],
)
def xml_format(completion: str, *, tags: Sequence[str] = ("reasoning", "answer")) -> float:
    """1 if the answer is exactly these elements, each once, non-empty, in this order, with nothing around them."""
    text = completion.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if not text.startswith(opening) or text.count(opening) != 1 or text.count(closing) != 1:
            return 0.0
        content, _, text = text[len(opening) :].partition(closing)
        if not content.strip():
            return 0.0
        text = text.strip()
    return float(not text)


def read_json(completion: str) -> tuple[bool, Any]:
    """(whether there is JSON, its value): the whole answer after its thinking, or its only code block."""
    completion = after_thinking(completion)
    blocks = fenced_blocks(completion)
    text = blocks[0][1] if len(blocks) == 1 and blocks[0][0] in ("json", "") else completion

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return True, json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError):
        return False, None


JSON_TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "number": (int, float), "boolean": bool}


@reward(
    "json_valid",
    range=(0, 1),
    source="RFC 8259",
    examples=[
        good('```json\n{"name": "Ada"}\n```'),
        bad("{'name': 'Ada'}"),
        adversarial('{"value": NaN}', 0.0, note="Python's parser takes it, JSON does not have it"),
    ],
)
def json_valid(completion: str, *, type: str | None = None) -> float:
    """1 if the answer, or its only code block, is JSON; with `type` (object, array, ...) of that type."""
    if type is not None and type not in JSON_TYPES:
        raise ConfigError(f"json_valid: type={type!r}: choose one of {', '.join(JSON_TYPES)}")
    found, value = read_json(completion)
    fits = type is None or (isinstance(value, JSON_TYPES[type]) and (type == "boolean" or not isinstance(value, bool)))
    return float(found and fits)


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    jsonschema = require("jsonschema", extra="rewards", why="the reward 'json_schema'")
    parsed = json.loads(schema)
    cls = jsonschema.validators.validator_for(parsed)
    try:
        cls.check_schema(parsed)
    except jsonschema.exceptions.SchemaError as error:
        raise RewardError(f"json_schema: the schema is not valid: {error.message}") from error
    return cls(parsed)


PERSON = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer", "minimum": 0}}, "additionalProperties": False}  # fmt: skip


@reward(
    "json_schema",
    range=(0, 1),
    source="JSON Schema, by jsonschema",
    aliases=["json_schema_verifiable"],
    examples=[
        good('{"age": 36}', params={"schema": PERSON}),
        bad('{"age": "36"}', params={"schema": PERSON}),
        adversarial('{"age": 36, "note": "and more"}', 0.0, params={"schema": PERSON}, note="an extra key"),
    ],
)
def json_schema(completion: str, schema: Mapping[str, Any] | str | None = None) -> float:
    """1 if the answer, or its only code block, is JSON that fits the schema (the column `schema`, or a param)."""
    if schema is None:
        raise ConfigError("json_schema needs a schema: the column `schema`, or params: {schema: {...}}")
    validator = _validator(schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True))
    found, value = read_json(completion)
    return float(found and validator.is_valid(value))


@reward(
    "regex_match",
    range=(0, 1),
    aliases=["regex", "regex_verifiable"],
    examples=[
        good("Ticket ABC-123 is done.", params={"pattern": r"\b[A-Z]{3}-\d{3}\b"}),
        bad("Ticket abc is done.", params={"pattern": r"\b[A-Z]{3}-\d{3}\b"}),
        adversarial(
            "ABC-123 and more", 0.0, params={"pattern": r"[A-Z]{3}-\d{3}", "whole": True}, note="text around it"
        ),
    ],
)
def regex_match(completion: str, pattern: str | None = None, *, whole: bool = False, timeout_s: float = 1.0) -> float:
    """1 if the pattern (a column or a param) is found, or with `whole` matches all of it (surrounding space aside)."""
    if pattern is None:
        raise ConfigError("regex_match needs a pattern: the column `pattern`, or params: {pattern: ...}")
    regex = require("regex", extra="rewards", why="the reward 'regex_match'")
    try:
        compiled = regex.compile(pattern)
        match = compiled.fullmatch if whole else compiled.search
        return float(match(completion.strip(), timeout=timeout_s) is not None)
    except regex.error as error:
        raise RewardError(f"regex_match: the pattern {pattern!r} is not valid: {error}") from error
    except TimeoutError:
        raise RewardError(
            f"regex_match: the pattern {pattern!r} took over {timeout_s} s: it backtracks without end on this text. "
            "Make it unambiguous (no nested repeats)"
        ) from None


@reward(
    "boxed_format",
    range=(0, 1),
    examples=[
        good(r"Therefore \boxed{\frac{1}{2}}."),
        bad("Therefore 1/2."),
        adversarial(r"\boxed{1} or \boxed{2}", 0.0, note="two answers"),
        adversarial(r"\boxed{\boxed{}}", 0.0, note="nothing in it"),
    ],
)
def boxed_format(completion: str) -> float:
    r"""1 if there is exactly one non-empty \boxed{...}."""
    found = answers.boxed(completion)
    return float(len(found) == 1 and bool(found[0].strip()))


CONSTRAINTS: dict[str, Callable[[str, Any], bool]] = {
    "min_words": lambda text, value: len(words(text)) >= value,
    "max_words": lambda text, value: 0 < len(words(text)) <= value,
    "min_paragraphs": lambda text, value: len(paragraphs(text)) >= value,
    "max_paragraphs": lambda text, value: 0 < len(paragraphs(text)) <= value,
    "bullets": lambda text, value: len(re.findall(r"^\s{0,12}[-*•] \S", text, re.MULTILINE)) == value,
    "numbered": lambda text, value: len(re.findall(r"^\s{0,12}\d{1,3}[.)] \S", text, re.MULTILINE)) == value,
    "include": lambda text, value: all(_has(text, word) for word in _list(value)),
    "exclude": lambda text, value: bool(text.strip()) and not any(_has(text, word) for word in _list(value)),
    "starts_with": lambda text, value: text.strip().startswith(value),
    "ends_with": lambda text, value: text.strip().endswith(value),
    "lowercase": lambda text, value: bool(words(text)) and (text == text.lower()) == value,
    "uppercase": lambda text, value: bool(words(text)) and (text == text.upper()) == value,
    "no_commas": lambda text, value: bool(text.strip()) and ("," not in text) == value,
    "json": lambda text, value: read_json(text)[0] == value,
    "title": lambda text, value: bool(re.search(r"<<[^\n<>]+>>|^# \S", text, re.MULTILINE)) == value,
}


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _has(text: str, phrase: str) -> bool:
    return f" {' '.join(words(phrase))} " in f" {' '.join(words(text))} "


TWO_BULLETS = {"bullets": 2, "include": "tea", "max_words": 12}


@reward(
    "instruction_following",
    range=(0, 1),
    source="after IFEval, arXiv 2311.07911 (verifiable instructions)",
    examples=[
        good("- green tea\n- black tea", constraints=TWO_BULLETS),
        bad(
            "I like tea, coffee and many other hot drinks that I will now list for you.", 1 / 3, constraints=TWO_BULLETS
        ),
        adversarial("", 0.0, constraints=TWO_BULLETS, note="an empty answer breaks no limit"),
    ],
)
def instruction_following(
    completion: str, constraints: Mapping[str, Any] | str, *, strict: bool = False
) -> float | None:
    """Share of the column's `constraints` that hold; `strict`: 1 only if all do. None without constraints.

    A dict (or its JSON): min_words, max_words, min_paragraphs, max_paragraphs, bullets, numbered, include, exclude,
    starts_with, ends_with, lowercase, uppercase, no_commas, json, title.
    """
    asked = json.loads(constraints) if isinstance(constraints, str) else constraints
    asked = {name: value for name, value in asked.items() if value is not None}  # Arrow fills absent keys with null
    for name in asked:
        if name not in CONSTRAINTS:
            raise RewardError(f"instruction_following: no constraint {name!r}; it knows: {', '.join(CONSTRAINTS)}")
    if not asked:
        return None
    held = sum(CONSTRAINTS[name](completion, value) for name, value in asked.items()) / len(asked)
    return float(held == 1) if strict else held
