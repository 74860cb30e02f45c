"""How a reward is found and called: by the arguments it names, with errors that say what to do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aligntune.errors import ConfigError, MissingExtra, RewardError, require
from aligntune.rewards import Batch, base, describe, get, good, reward
from aligntune.rewards.call import Caller


def call(
    function: Any, completions: Any = ("a", "bb"), params: Any = None, on_error: str = "raise", **rest: Any
) -> list[Any]:
    batch = Batch(rest.pop("prompts", ["p"] * len(completions)), list(completions), rest.pop("columns", {}), **rest)
    return Caller(get(function), params)(batch, on_error)[0]


# --- arguments ---------------------------------------------------------------------------------------------------


def test_a_function_gets_what_it_names() -> None:
    def f(prompt, completion, level, messages, tokenizer, completion_ids):
        assert messages == [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return len(prompt) * 100 + len(completion) * 10 + level + len(completion_ids) / 10 + tokenizer / 100

    columns = {"level": [1, 2], "unused": ["x", "y"]}
    assert call(f, columns=columns, completion_ids=[[7], [7, 7]], tokenizer=5) == pytest.approx([111.15, 122.25])


def test_messages_are_read_as_text() -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    completion = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "end"},
    ]
    assert call(
        lambda prompt, completion: float(f"{prompt}|{completion}" == "hi|end"), [completion], prompts=[prompt]
    ) == [1.0]
    assert call(lambda completion: len(completion), [[{"role": "tool", "content": "t"}]]) == [0.0]


def test_a_batched_function_gets_lists_as_they_came() -> None:
    messages = [[{"role": "assistant", "content": "a"}]]

    def trl_style(prompts, completions, **kwargs):
        assert completions == messages
        assert kwargs == {"level": [3]}
        return [len(completions[0][0]["content"])]

    assert call(trl_style, messages, columns={"level": [3]}) == [1.0]


def test_params_defaults_and_columns() -> None:
    def f(completion, weight=2.0, *, factor=10.0):
        return weight * factor

    assert call(f) == [20.0, 20.0]
    assert call(f, params={"weight": 3.0, "factor": 1.0}) == [3.0, 3.0]
    assert call(f, columns={"weight": [1, 2], "factor": [0, 0]}) == [10.0, 20.0], "after * only params count"
    assert call(f, columns={"w": [1, 2]}, params={"columns": {"weight": "w"}}) == [10.0, 20.0]


def test_columns_have_common_names_and_can_be_renamed() -> None:
    assert call("exact_match", ["Paris"], columns={"ground_truth": ["paris"]}) == [1.0]
    both = {"answer": ["Rome"], "solution": ["Paris"]}
    assert call("exact_match", ["Paris"], columns=both) == [0.0], "`answer` comes first"
    assert call("exact_match", ["Paris"], params={"columns": {"answer": "solution"}}, columns=both) == [1.0]


def test_async_per_sample_and_batched() -> None:
    running, most = 0, 0

    async def one(completion):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.01)
        running -= 1
        return len(completion)

    async def many(completions):
        await asyncio.sleep(0)
        return [len(text) for text in completions]

    assert call(one, ["a", "bb", "ccc"]) == [1.0, 2.0, 3.0]
    assert most == 3
    assert call(many) == [1.0, 2.0]

    class Object:
        async def __call__(self, completion):
            await asyncio.sleep(0)
            return len(completion)

    assert Caller(get(Object()))(Batch(["", ""], ["a", "bb"]))[0] == [1.0, 2.0]
    assert Caller(get(lambda completion: one(completion)))(Batch(["", ""], ["a", "bb"]))[0] == [1.0, 2.0]

    async def inside_a_loop():
        return call(one)

    assert asyncio.run(inside_a_loop()) == [1.0, 2.0]


def test_none_is_not_applicable_and_numbers_of_any_kind_count() -> None:
    assert call(lambda completions: [None, True]) == [None, 1.0]
    assert call(lambda completions: np.array([0.5, 1])) == [0.5, 1.0]
    assert call(lambda completions: torch.tensor([0.5, 1])) == [0.5, 1.0]
    assert call(lambda completion: torch.tensor(2.0)) == [2.0, 2.0]
    assert call(lambda completion: np.float32(0.5)) == [0.5, 0.5]


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", [1.0], np.array([1.0, 2.0]), {}], ids=repr)
def test_what_is_no_score_is_an_error(value: object) -> None:
    with pytest.raises(
        RewardError, match=r"returned .*sample 0 of 2:\n  prompt: 'p'\n  completion: 'a'\n.*finite number.*None"
    ):
        call(lambda completion: value)


@pytest.mark.parametrize("value", [[1.0], 1.0, None, "ab", [1.0, 2.0, 3.0]], ids=repr)
def test_a_batched_reward_returns_one_score_each(value: object) -> None:
    with pytest.raises(RewardError, match=r"for 2 completions: return a list"):
        call(lambda completions: value)


def test_scores_stay_in_the_declared_range() -> None:
    @reward("out_of_range", range=(0, 1), examples=[good("a")])
    def out_of_range(completion):
        return 1.5

    with pytest.raises(RewardError, match=r"returned 1.5, outside its range \[0, 1\]"):
        call(out_of_range)


def test_an_exception_shows_the_sample() -> None:
    def f(completion):
        return 1 / (len(completion) - 2)

    with pytest.raises(
        RewardError, match=r"raised ZeroDivisionError.*\nsample 1 of 2:(.|\n)*completion: 'bb'(.|\n)*on_error: null"
    ) as caught:
        call(f)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_on_error_null_counts_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    def f(completion):
        return 1 / (len(completion) - 2)

    scores, failures = Caller(get(f))(Batch(["p"] * 3, ["a", "bb", "cc"]), "null")
    assert scores == [-1.0, None, None]
    assert [failure.sample for failure in failures] == [1, 2]
    (told,) = caplog.messages  # however many raised, and without advice to do what was done
    assert told.startswith("2 of 3 completions count as null; the first: reward 'f' raised ZeroDivisionError: ")
    assert "'bb'" in told
    assert "on_error" not in told
    with pytest.raises(RewardError, match="finite number"):
        call(lambda completion: float("nan"), on_error="null")


def test_a_missing_package_is_never_a_null() -> None:
    with pytest.raises(MissingExtra, match=r"aligntune\[rewards\]"):
        call(lambda completion: require("no_such_package_here", extra="rewards"), on_error="null")


def test_a_wrong_setting_is_never_a_null() -> None:
    with pytest.raises(ConfigError, match="unit='lines'"):
        call("length", params={"unit": "lines"}, on_error="null")
    with pytest.raises(ConfigError, match="isolation='total'"):
        call("code_runs", params={"isolation": "total"}, on_error="null")


def test_missing_columns_and_arguments_name_what_is_there() -> None:
    with pytest.raises(
        RewardError, match=r"needs the column 'level'; the dataset has: other.*columns: \{level: your_column\}"
    ):
        call(lambda completion, level: 0.0, columns={"other": [1, 2]})
    with pytest.raises(RewardError, match="needs the column 'answer' or 'solution'"):
        call("exact_match")
    with pytest.raises(RewardError, match="needs tokenizer"):
        call(lambda completion, tokenizer: 0.0)


def test_unknown_params_have_the_closest_name() -> None:
    with pytest.raises(RewardError, match=r"'length' has no param 'max_lenght': did you mean 'max_length'\?"):
        call("length", params={"max_lenght": 3})
    with pytest.raises(RewardError, match=r"it is a dataset column"):
        call("exact_match", params={"answer": "x"})
    with pytest.raises(RewardError, match="reads no column 'answr'"):
        call("exact_match", params={"columns": {"answr": "x"}})


def test_lengths_must_agree() -> None:
    with pytest.raises(RewardError, match="level has 1 entries for 2 completions"):
        call(lambda completion: 0.0, columns={"level": [1]})


def test_positional_only_functions_are_refused() -> None:
    with pytest.raises(RewardError, match="called by argument name"):
        call(lambda completion, /: 0.0)


# --- the registry ------------------------------------------------------------------------------------------------


def test_names_are_forgiving_and_unknown_ones_helpful() -> None:
    assert get("Exact-Match").name == "exact_match"
    assert get("harmlessness").name == "safety"
    with pytest.raises(RewardError, match=r"unknown reward 'lenght': did you mean length"):
        get("lenght")
    with pytest.raises(RewardError, match=r"no rule on a text can measure it\. Use the reward 'judge'"):
        get("medical_accuracy")
    with pytest.raises(RewardError, match="aligntune reward list"):
        get("zzzzqqq")


def test_functions_from_files_and_modules(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from aligntune.rewards import reward\n"
        "def plain(completion, *, word='x'): return float(word in completion)\n"
        "@reward('mine_named', range=(0, 1))\ndef named(completion): return 1.0\n"
    )
    assert call(f"{file}:plain", ["axb", "b"]) == [1.0, 0.0]
    assert call(f"{file}:plain", ["axb", "b"], params={"word": "b"}) == [1.0, 1.0]
    assert get(f"{file}:named").name == "mine_named"
    assert get(f"{file}:named").custom
    assert get("textwrap:dedent").name == "dedent"
    with pytest.raises(ConfigError, match="no function 'nothing'"):
        get(f"{file}:nothing")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(RewardError, match="'length' is taken"):

        @reward("length")
        def other(completion):
            return 0.0


def test_describe_is_plain_data() -> None:
    described = describe("math_correctness")
    assert described["columns"] == ["answer"]
    assert described["params"] == {"timeout_s": 5.0}
    assert described["range"] == [0, 1]
    assert describe("fluency")["heuristic"]
    assert not describe("bleu")["heuristic"]
    assert set(base.names()) >= {"length", "judge"}


def test_a_completion_that_is_no_text_is_named() -> None:
    with pytest.raises(RewardError, match="completions, row 1: None is neither a text nor a list of messages"):
        Batch(["", ""], ["a", None])
