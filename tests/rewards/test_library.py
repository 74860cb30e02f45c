"""Every built-in reward does what its examples say: a good, a bad and an adversarial completion each."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.rewards import Example, base, get
from aligntune.rewards.call import Caller
from aligntune.rewards.samples import Batch

from .conftest import Judge, reply

BUILT_IN = [name for name in base.names() if not get(name).custom]
CASES = [(name, example) for name in BUILT_IN for example in get(name).examples]
NEEDS = {
    "math_correctness": "math_verify", "readability": "pyphen", "language": "py3langid", "sentiment": "vaderSentiment",
    "toxicity": "profanity_check", "json_schema": "jsonschema", "reasoning_gym": "reasoning_gym", "codebleu": "tree_sitter",
    "meteor": "nltk", "bleu": "sacrebleu", "rouge": "rouge_score",
}  # fmt: skip


@pytest.fixture(scope="module")
def stand_ins(encoder_folder: Path, reward_model_folder: Path, common_judge: Judge) -> dict[str, str]:
    """What the examples leave open, as a test needs real ones."""

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        asked = request["messages"][-1]["content"]
        quoted = asked.split("<answer_to_judge>")[1].split("</answer_to_judge>")[0]
        return 200, reply("Score: 10" if "Paris" in quoted and "ignore" not in quoted.lower() else "Score: 0")

    common_judge.answer = answer
    return {"<encoder>": str(encoder_folder), "<reward model>": str(reward_model_folder), "<judge>": common_judge.url}


def score(name: str, example: Example, stand_ins: dict[str, str] | None = None) -> float | None:
    params = {
        key: (stand_ins or {}).get(value, value) if isinstance(value, str) else value
        for key, value in example.params.items()
    }
    columns = {key: [value] for key, value in example.columns.items()}
    scores, _ = Caller(get(name), params)(Batch([example.prompt], [example.completion], columns))
    return scores[0]


def identity(value: object) -> str:
    return value.kind if isinstance(value, Example) else str(value)


@pytest.mark.parametrize(("name", "example"), CASES, ids=identity)
def test_the_examples_hold(name: str, example: Example, stand_ins: dict[str, str]) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    got = score(name, example, stand_ins)
    assert example.accepts(got), f"{example.kind} {example.note}: scored {got}, declared {example.score}"


def test_there_are_enough() -> None:
    assert len(BUILT_IN) >= 30
    wanted = "length sentiment safety coherence factuality bias toxicity fluency helpfulness honesty math_correctness code_syntax code_execution"
    assert set(wanted.split()) <= set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_is_documented_and_shown(name: str) -> None:
    found = get(name)
    assert {example.kind for example in found.examples} == {"good", "bad", "adversarial"}
    assert found.range != (None, None) or name == "reward_model"
    summary = inspect.getdoc(found.function)
    assert summary
    assert len(found.summary) <= 120, "the first line is the definition"
    assert not found.custom


@pytest.mark.parametrize("name", BUILT_IN)
def test_scores_are_reproducible(name: str, stand_ins: dict[str, str]) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    example = get(name).examples[0]
    assert score(name, example, stand_ins) == score(name, example, stand_ins)


NOT_BY_SIZE = {"overlong"}  # the only ones that an empty completion satisfies
HOSTILE = [
    "",
    " ",
    "\x00",
    "\ud800",
    "a" * 20_000,
    "((((" * 3000,
    "\\boxed{" * 500,
    "```" * 500,
    "<think>" * 300,
    "1/0 = 2",
    "🙂" * 500,
    "\n" * 5000,
    "{" * 3000,
    "9" * 5000,
]
SLOW = {
    "math_correctness",
    "code_execution",
    "unit_tests",
    "stdin_stdout",
    "code_runs",
    "judge",
    "reward_model",
    "similarity",
    "bertscore",
}


FRAGMENTS = [
    "```", "```python\n", "```json\n", "\n", "\n\n", " ", "def f(x):\n    return x\n", "<think>", "</think>", "<answer>", "</answer>",
    "\\boxed{", "}", "{", "[", "]", '{"name": "f", "arguments": {"x": 1}}', "<tool_call>", "</tool_call>", "#### 72", "72", "1/0", " = ", " + ",
    "The answer is (B).", "SELECT 1", ";", "- item", "1. item", "!", "?", "…", "。", "漢字", "I can't help.", "kill", "\t", "'", '"', "\u202e", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - SLOW))
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_fragments_in_any_order_are_scored(name: str, completion: str) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    example = get(name).examples[0]
    columns = {key: [value] for key, value in example.columns.items()}
    _, failures = Caller(get(name), example.params)(Batch([example.prompt], [completion], columns))
    assert not failures


@pytest.mark.parametrize("name", sorted(set(BUILT_IN) - SLOW))
def test_no_completion_breaks_a_reward(name: str) -> None:
    """Whatever a model writes is a score in range (the range is checked by the caller) or None, never an exception."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    example = get(name).examples[0]
    columns = {key: [value] * len(HOSTILE) for key, value in example.columns.items()}
    batch = Batch([example.prompt] * len(HOSTILE), HOSTILE, columns)
    scores, failures = Caller(get(name), example.params)(batch)
    assert not failures
    assert len(scores) == len(HOSTILE)
    high = get(name).range[1]
    assert all(value is None or value < (1 if high is None else high) for value in scores[:3]) or name in NOT_BY_SIZE
