"""Is the completion the reference answer? Exact, fuzzy, contained, overlapping words, or the right letter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from aligntune.errors import RewardError

from . import answers
from .base import adversarial, bad, good, reward
from .words import after_thinking


def _best(completion: str, answer: Any, score: Callable[[str, str], float]) -> float:
    """The score against the alternative that fits best."""
    return max((score(completion, option) for option in answers.alternatives(answer)), default=0.0)


@reward(
    "exact_match",
    range=(0, 1),
    source="SQuAD, Rajpurkar et al. 2016 (normalisation)",
    examples=[
        good("the Eiffel tower.", answer="Eiffel Tower"),
        bad("Big Ben", answer="Eiffel Tower"),
        adversarial("Eiffel Tower, or maybe Big Ben", 0.0, answer="Eiffel Tower", note="hedging"),
    ],
)
def exact_match(
    completion: str,
    answer: Any,
    *,
    extract: str = "whole",
    ignore_case: bool = True,
    ignore_punctuation: bool = True,
) -> float:
    """1 if the answer equals the reference (or one of a list) up to case, punctuation, articles and spaces.

    `extract` says which part of the completion is the answer: whole, last_line, boxed, tag, hashes or auto.
    """
    found = answers.extract(completion, extract)
    if found is None:
        return 0.0
    options = {"ignore_case": ignore_case, "ignore_punctuation": ignore_punctuation}
    given = answers.normalise(found, **options)
    wanted = [answers.normalise(option, **options) or option for option in answers.alternatives(answer)]
    return float((given or found) in wanted)


def levenshtein(left: str, right: str) -> int:
    """Edits that turn one text into the other, by Myers' bit-parallel algorithm (1999) on Python's long integers."""
    if not left or not right:
        return len(left) + len(right)
    places: dict[str, int] = {}
    for i, character in enumerate(left):
        places[character] = places.get(character, 0) | 1 << i
    full, top = (1 << len(left)) - 1, 1 << (len(left) - 1)
    plus, minus, distance = full, 0, len(left)
    for character in right:
        equal = places.get(character, 0)
        vertical = equal | minus
        horizontal = (((equal & plus) + plus) ^ plus) | equal
        grown, shrunk = minus | (full & ~(horizontal | plus)), plus & horizontal
        distance += bool(grown & top) - bool(shrunk & top)
        grown, shrunk = (grown << 1 | 1) & full, shrunk << 1 & full
        plus, minus = shrunk | (full & ~(vertical | grown)), grown & vertical
    return distance


@reward(
    "fuzzy_match",
    range=(0, 1),
    source="Levenshtein 1966",
    examples=[
        good("Eiffel Tower", answer="Eiffel Tower"),
        bad("zzz", 0.0, answer="Eiffel"),
        adversarial("Eiffel Tower " * 20, (0.0, 0.06), answer="Eiffel Tower", note="padding the right answer"),
    ],
)
def fuzzy_match(completion: str, answer: Any, *, extract: str = "whole") -> float:
    """1 - edit distance / length of the longer text, after lower-casing; texts are compared up to 4000 characters."""
    found = answers.normalise(answers.extract(completion, extract) or "", ignore_punctuation=False)[:4000]

    def score(given: str, option: str) -> float:
        wanted = answers.normalise(option, ignore_punctuation=False)[:4000]
        return 1 - levenshtein(given, wanted) / max(len(given), len(wanted), 1)

    return _best(found, answer, score)


@reward(
    "contains_answer",
    range=(0, 1),
    examples=[
        good("It was built by Gustave Eiffel in 1889.", answer=["Gustave Eiffel", "G. Eiffel"]),
        bad("It was built in Paris.", answer="Gustave Eiffel"),
        adversarial("The eiffelian style", 0.0, answer="Eiffel", note="inside another word"),
    ],
)
def contains_answer(completion: str, answer: Any) -> float:
    """1 if the reference (or one of a list) occurs in the completion as whole words. An answer that lists
    every possibility scores, too: use exact_match with `extract` where that matters."""
    text = f" {answers.normalise(completion)} "
    return _best(text, answer, lambda given, option: float(f" {answers.normalise(option)} " in given))


@reward(
    "f1",
    range=(0, 1),
    source="SQuAD token F1, Rajpurkar et al. 2016",
    examples=[
        good("the red fox", answer="red fox"),
        bad("a blue whale", answer="red fox"),
        adversarial("red fox " + "blue whale " * 9, (0.0, 0.2), answer="red fox", note="burying the answer"),
    ],
)
def f1(completion: str, answer: Any) -> float:
    """F1 of the words shared with the reference, each as often as it occurs in both."""

    def score(given: str, option: str) -> float:
        said, wanted = given.split(), answers.normalise(option).split()
        shared = (Counter(said) & Counter(wanted)).total()
        return 2 * shared / (len(said) + len(wanted)) if shared else 0.0

    return _best(answers.normalise(completion), answer, score)


_LETTER_FORMS = (
    re.compile(r"<answer>\s*\(?([A-Z])(?:[).:]\s[^<]*|\)?[.:]?\s*)</answer>", re.IGNORECASE),
    re.compile(r"\\boxed\{\s*\(?([A-Z])(?:[).:]\s[^{}]*|\)?[.:]?\s*)\}", re.IGNORECASE),
    re.compile(r"(?:answer|choice|option)(?: is|:)[:\s]{0,3}\(?(?:((?-i:[A-Z]))\b(?!')|([a-z])(?=[).:]|\s*$))", re.IGNORECASE | re.MULTILINE),
)  # fmt: skip
_LONE_LETTER = re.compile(r"(?:option |choice )?(?:\(([A-Z])\)|([A-Z])[).:](?=\s|$)|([A-Z])$)", re.IGNORECASE)
_MARKUP = re.compile(r"\*\*|[`$]|\\[()]|\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def chosen_letter(text: str) -> str | None:
    """The letter that a completion settles on after its thinking: marked as the answer (the last such), or opening its
    last line, or the only one in brackets; None when it settles on none."""
    text = _MARKUP.sub(r"\1", after_thinking(text)).strip()
    for form in _LETTER_FORMS:
        if found := list(form.finditer(text)):
            return next(letter for letter in found[-1].groups() if letter).upper()
    bracketed = set(re.findall(r"\(([A-Z])\)", text))
    if len(bracketed) > 1:
        return None
    last_line = (text.splitlines() or [""])[-1]
    if opening := _LONE_LETTER.match(last_line):
        return next(letter for letter in opening.groups() if letter).upper()
    return bracketed.pop() if bracketed else None


def _wanted_letter(answer: Any, choices: Sequence[Any] | None) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return chr(ord("A") + answer)
    text = str(answer).strip()
    if len(text.strip("().")) == 1 and text.strip("().").isalpha():
        return text.strip("().").upper()
    if choices is not None and text in [str(choice) for choice in choices]:
        return chr(ord("A") + [str(choice) for choice in choices].index(text))
    raise RewardError(f"choice_letter: the answer {answer!r} is neither a letter, an index nor one of the choices")


@reward(
    "choice_letter",
    range=(0, 1),
    aliases=["multiple_choice"],
    examples=[
        good("Copper conducts best, so the answer is (B).", answer="B"),
        bad("The answer is C.", answer="B"),
        adversarial("(A) or (B) or (C) or (D)", 0.0, answer="B", note="naming all of them"),
    ],
)
def choice_letter(completion: str, answer: Any, choices: Sequence[Any] | None = None) -> float:
    """1 if the letter chosen (answer tag, boxed, "answer is", or alone) is the right one.

    The answer is a letter, an index from 0, or the text of one of the column `choices`.
    """
    return float(chosen_letter(completion) == _wanted_letter(answer, choices))
