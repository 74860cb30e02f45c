"""What is a reward? A function with a decorator, called with the arguments it names.

    @reward("polite_end", range=(0, 1), examples=[good("Thanks, bye."), bad("Go away."), adversarial("thanks" * 9, 0)])
    def polite_end(completion, *, words=("thanks", "please")):
        \"""1 if the last sentence thanks or asks.\"""

A parameter is filled by its name: `prompt` and `completion` (texts), `messages` (the whole conversation),
`completion_ids`, `tokenizer`, or a column of the dataset. Parameters with a default can be set from
`RewardConfig.params`, and those after `*` only from there. A function that names `prompts` or `completions` gets
lists, as they came from the dataset (strings or message lists), and returns a list. It may be `async`. It returns a
number, higher is better, or None where it does not apply.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from aligntune.config.words import plain_word
from aligntune.errors import RewardError

from .samples import Text

Function = TypeVar("Function", bound=Callable[..., Any])
Range = tuple[float | None, float | None]

RESERVED = ("prompt", "completion", "prompts", "completions", "messages", "completion_ids", "tokenizer")

COLUMN_SYNONYMS = {
    "answer": ("answer", "solution", "ground_truth", "final_answer", "expected_answer", "reference", "target", "label"),
    "reference": ("reference", "references", "answer", "ground_truth", "target", "solution"),
    "tests": ("tests", "test", "test_list", "test_cases", "unit_tests"),
}
"""Where a parameter of that name is looked for, in this order; `params: {columns: {answer: my_column}}` overrides it."""


@dataclass(frozen=True)
class Example:
    """A completion and what it must score: a number, a closed interval, or None. `note` says what it shows."""

    kind: Literal["good", "bad", "adversarial"]
    completion: Text
    score: float | tuple[float, float] | None
    prompt: Text = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def accepts(self, score: float | None) -> bool:
        """Whether `score` is what this example must score, to 1e-3."""
        if score is None or self.score is None:
            return score is self.score
        low, high = self.score if isinstance(self.score, tuple) else (self.score, self.score)
        return low - 1e-3 <= score <= high + 1e-3


def _example(kind: Literal["good", "bad", "adversarial"], default: float | None) -> Callable[..., Example]:
    def make(
        completion: Text,
        score: float | tuple[float, float] | None = default,
        *,
        prompt: Text = "",
        params: Mapping[str, Any] | None = None,
        note: str = "",
        **columns: Any,
    ) -> Example:
        return Example(kind, completion, score, prompt, params or {}, columns, note)

    return make


good = _example("good", 1.0)
bad = _example("bad", 0.0)
adversarial = _example("adversarial", 0.0)


@dataclass(frozen=True)
class Reward:
    """A registered reward: the function and what is said of it."""

    name: str
    function: Callable[..., Any]
    range: Range = (None, None)
    source: str = ""
    heuristic: bool = False
    examples: tuple[Example, ...] = ()
    aliases: tuple[str, ...] = ()
    custom: bool = False

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.function).parameters)

    @property
    def batched(self) -> bool:
        return bool({"prompts", "completions"} & set(self.parameters))


_rewards: dict[str, Reward] = {}
_aliases: dict[str, str] = {}

NO_RULE = (
    "commonsense", "medical_accuracy", "legal_compliance", "financial_accuracy", "causal_reasoning", "engagement",
    "counterfactual_reasoning", "logical_consistency", "temporal_consistency", "image_relevance", "audio_quality",
)  # fmt: skip
"""Names users of other tools ask for, which no rule on the text can measure."""


def reward(
    name: str,
    *,
    range: Range = (None, None),
    source: str = "",
    heuristic: bool = False,
    examples: Sequence[Example] = (),
    aliases: Sequence[str] = (),
) -> Callable[[Function], Function]:
    """Register the function under `name`. `range` is checked on every score; `source` says where the definition is from.

    `heuristic` marks a score that only stands in for what its name says. The docstring's first line is its definition.
    """

    def register(function: Function) -> Function:
        custom = not function.__module__.startswith("aligntune.")
        made = Reward(name, function, range, source, heuristic, tuple(examples), tuple(aliases), custom)
        for key in (name, *aliases):
            known = _rewards.get(_aliases.get(key, key))
            if known is not None and known.function.__qualname__ != function.__qualname__:
                raise RewardError(f"the reward name {key!r} is taken: give yours another name")
        _rewards[name] = made
        _aliases.update(dict.fromkeys(aliases, name))
        function.__reward__ = made  # type: ignore[attr-defined]
        return function

    return register


def names() -> list[str]:
    """Names of all registered rewards, sorted."""
    return sorted(_rewards)


def get(reward: str | Callable[..., Any] | Reward) -> Reward:
    """The reward behind a name, a callable, `module:function` or `file.py:function`.

    Raises:
        RewardError: no reward has this name; the message has the closest ones.
        ConfigError: no such module, file or function.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str) and ":" in reward:
        from aligntune.data.functions import find_function

        reward = find_function(reward, "rewards.type")
    if callable(reward):
        label = getattr(reward, "__name__", type(reward).__name__)
        return getattr(reward, "__reward__", None) or Reward(label, reward, custom=True)
    key = plain_word(reward)
    key = _aliases.get(key, key)
    if key not in _rewards:
        raise RewardError(_unknown(reward, key))
    return _rewards[key]


def _unknown(given: str, key: str) -> str:
    if key in NO_RULE:
        return (
            f"there is no reward {given!r}: no rule on a text can measure it. Use the reward 'judge' with a rubric that "
            "says what you want, or a reward model (the reward 'reward_model')"
        )
    close = difflib.get_close_matches(key, [*_rewards, *_aliases], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`aligntune reward list` shows all."
    return f"unknown reward {given!r}: {hint} Your own: a callable, 'module:function' or 'file.py:function'"


def describe(reward: str | Callable[..., Any] | Reward) -> dict[str, Any]:
    """One reward as plain data: name, aliases, summary, range, source, heuristic, params with defaults, columns."""
    from .call import Signature

    found = get(reward)
    signature = Signature.of(found)
    return {
        "name": found.name,
        "aliases": list(found.aliases),
        "summary": found.summary,
        "range": list(found.range),
        "source": found.source,
        "heuristic": found.heuristic,
        "columns": signature.columns,
        "params": signature.defaults,
    }
