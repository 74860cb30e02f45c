"""Is the mathematics right? Numbers exactly, expressions by math-verify, steps by doing them again."""

from __future__ import annotations

import ast
import operator
import os
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

from aligntune.errors import RewardError, require

from . import answers
from .base import adversarial, bad, good, reward
from .samples import Text, completion_text

if TYPE_CHECKING:
    from .sandbox.service import Service


@cache
def _verifier(timeout_s: float, process: int) -> Service:
    """One for each time limit and process: a fork of the trainer must not share the parent's."""
    from .sandbox.limits import Limits
    from .sandbox.service import Service

    require("math_verify", extra="rewards", why="the reward 'math_correctness'")
    limits = Limits(wall_s=timeout_s, memory_mb=2048)
    return Service("guest.mathcheck:check", ["math_verify"], limits)


@reward(
    "math_correctness",
    range=(0, 1),
    source="math-verify (Kydlíček et al. 2025)",
    aliases=["math_verifiable", "math", "accuracy", "counterfactual_math"],
    examples=[
        good(r"Adding, we get \boxed{\frac{1}{2}}", answer="0.5"),
        good(r"So the roots are \boxed{\{1, 2\}}", answer=r"$\{2, 1\}$"),
        bad(r"\boxed{3}", answer="2"),
        adversarial(
            r"\boxed{9^{9^{9^{9^9}}}}",
            0.0,
            answer="2",
            params={"timeout_s": 0.5},
            note="a number that cannot be computed",
        ),
        adversarial(r"It is 1, 2, 3 or 4. \boxed{}", 0.0, answer="2", note="every candidate, none chosen"),
        adversarial(r"\boxed{2} or \boxed{3}", 0.0, answer="2", note="two answers: the last one counts"),
    ],
)
def math_correctness(completions: list[Text], answer: list[Any], *, timeout_s: float = 5.0) -> list[Any]:
    r"""1 if the final answer (boxed, <answer>, ####, "the answer is", or the last line) equals the reference.

    Plain numbers are compared exactly, anything else by math-verify in a confined process. An answer that cannot be
    compared within `timeout_s` is not verified and scores 0.
    """
    texts = [completion_text(completion) for completion in completions]
    scores: list[Any] = [_by_number(text, gold) for text, gold in zip(texts, answer, strict=True)]
    open_cases = [i for i, score in enumerate(scores) if score is None]
    if open_cases:
        calls = [{"gold": _as_math(answer[i]), "answer": _final(texts[i])} for i in open_cases]
        for i, result in zip(open_cases, _verifier(timeout_s, os.getpid()).call_all(calls), strict=True):
            scores[i] = _verified(result, texts[i], answer[i])
    return scores


def _gold_text(answer: Any) -> str:
    """The answer within a reference solution: GSM8K's after ####, MATH's in the box, otherwise all of it."""
    text = str(answer)
    found = answers.extract(text, "hashes") or answers.extract(text, "boxed")
    return found if found is not None else text.strip()


def _by_number(completion: str, gold: Any) -> float | None:
    """1 or 0 when both sides are plain numbers or words (or the answer is missing); None: math-verify has to decide."""
    found = answers.extract(completion)
    if not found:
        return 0.0
    wanted_text = _gold_text(gold)
    found, wanted_text = _unwrapped(found), _unwrapped(wanted_text)
    if found == wanted_text or (_letter(found) and _letter(found) == _letter(wanted_text)):
        return 1.0
    if _WORDS.fullmatch(wanted_text):  # "yes", a name: math-verify would read a product of letters
        return float(answers.normalise(found) == answers.normalise(wanted_text))
    if "%" in found or "%" in wanted_text:
        return None
    given, wanted = (answers.parse_number(answers.plain(text).strip("$ ")) for text in (found, wanted_text))
    if given is None or wanted is None:
        return None
    return float(given == wanted)


_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")


_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{\s*([^{}]*?)\s*\}")


def _unwrapped(text: str) -> str:
    r"""Without the marks that stand around all of it: $...$, \(...\), `...`, **...**, \text{...}."""
    if len(text) > 1000:
        return text
    inner = re.sub(
        r"^(?:\$+|\\\(|`+|\*\*)\s*(.*?)\s*(?:\$+|\\\)|`+|\*\*)([.]?)$", r"\1\2", text.strip(), flags=re.DOTALL
    )
    wrapped = _TEXT.fullmatch(inner)
    return (wrapped.group(1) if wrapped else inner) or text


def _letter(text: str) -> str:
    """The letter of a choice: B, (B), "(B).", or none."""
    found = re.fullmatch(r"\(?([A-Z])\)?\.?", text)
    return found.group(1) if found else ""


_WITH_UNIT = re.compile(r"[-+−]?\$?[\d,.]+(?: (?!pi\b)[A-Za-z]{2,})+\.?")


def _as_math(answer: Any) -> str:
    text = _gold_text(answer)
    return text if "$" in text.replace("\\$", "") or "\\boxed" in text else f"${text}$"


def _final(completion: str) -> str:
    """What math-verify is shown: the marked answer in a box, else the last line as it is. A number with its unit stays
    out of the box, where "72 clips" would be a product of letters."""
    for how in ("tag", "boxed", "hashes"):
        if (found := answers.extract(completion, how)) is not None:
            return found if _WITH_UNIT.fullmatch(found) else f"\\boxed{{{found.strip('$')}}}"
    return answers.extract(completion) or ""


def _verified(result: Any, completion: str, gold: Any) -> Any:
    from .sandbox.service import TimedOut

    if isinstance(result, TimedOut):
        return 0.0
    if isinstance(result, Exception):
        return result
    if not result["gold"]:  # a text answer ("yes", a name): compared as text
        found = answers.normalise(answers.extract(completion) or "", ignore_punctuation=False)
        return float(found == answers.normalise(_gold_text(gold), ignore_punctuation=False))
    return float(result["equal"])


@reward(
    "numeric_answer",
    range=(0, 1),
    examples=[
        good("Half of 48 is 24, and 48 + 24 = 72. The answer is 72.", answer=72),
        bad("The answer is 71.", answer="72"),
        adversarial("72 71 70 69", 0.0, answer="72", note="many numbers: the last one counts"),
    ],
)
def numeric_answer(completion: str, answer: Any, *, relative: float = 0.0, absolute: float = 0.0) -> float:
    """1 if the last number of the final answer equals the reference, within `relative` or `absolute` if set."""
    wanted = answers.numbers(_gold_text(answer))
    if not wanted:
        raise RewardError(f"numeric_answer: the reference {answer!r} has no number")
    found = answers.numbers(answers.extract(completion) or "") or answers.numbers(completion)
    if not found:
        return 0.0
    margin = max(Fraction(absolute), abs(wanted[-1]) * Fraction(relative))
    return float(abs(found[-1] - wanted[-1]) <= margin)


@reward(
    "gsm8k",
    range=(0, 1),
    source="Cobbe et al. 2021, arXiv 2110.14168: the number after ####",
    examples=[
        good("She sold 48/2 = 24 in May.\n48 + 24 = 72\n#### 72", answer="48+24=<<48+24=72>>72\n#### 72"),
        bad("#### 24", answer="#### 72"),
        good("#### 72 clips", answer="#### 72"),
        adversarial("It could be 72 or 24.", 0.0, answer="#### 72", note="the right number, not given as the answer"),
    ],
)
def gsm8k(completion: str, answer: Any, *, strict: bool = True) -> float:
    """1 if the number after the last #### is the reference's. Not `strict`: the last number of any answer."""
    if not strict:
        return numeric_answer(completion, answer)
    found = answers.extract(completion, "hashes")
    given = None if found is None else answers.opening_number(found)
    wanted = answers.parse_number(_gold_text(answer))
    if wanted is None:
        raise RewardError(f"gsm8k: the reference {answer!r} does not end in #### and a number")
    return float(given == wanted)


OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def evaluate(expression: str) -> tuple[Fraction, list[Fraction]] | None:
    """Value of an expression of numbers, + - * / and brackets, and its numbers; None if it is anything else."""
    text = expression.replace("×", "*").replace("·", "*").replace("÷", "/").replace("−", "-").replace("^", "**")
    if len(text) > 300:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        used: list[Fraction] = []
        return _value(tree.body, used), used
    except (SyntaxError, ValueError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST, used: list[Fraction]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))  # inf, as 1e999 is read, is a ValueError
        used.append(value)
        return value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand, used))
    raise ValueError("not arithmetic")


@reward(
    "countdown",
    range=(0, 1),
    source="the Countdown task of TinyZero (Pan et al. 2025)",
    examples=[
        good("<answer>(25 - 5) * 3</answer>", numbers=[3, 5, 25], target=60),
        bad("<answer>25 + 5 + 3</answer>", numbers=[3, 5, 25], target=60),
        adversarial("<answer>60</answer>", 0.0, numbers=[3, 5, 25], target=60, note="the target itself"),
        adversarial("<answer>25*5 - 25*5 + 60</answer>", 0.0, numbers=[3, 5, 25], target=60, note="numbers used twice"),
    ],
)
def countdown(completion: str, numbers: Sequence[int], target: float) -> float:
    """1 if the expression in <answer> uses each of the column's numbers exactly once and equals the target."""
    found = answers.extract(completion, "tag")
    result = evaluate(found.partition("=")[0]) if found else None
    if result is None:
        return 0.0
    value, used = result
    return float(value == Fraction(str(target)) and sorted(used) == sorted(Fraction(str(n)) for n in numbers))


_RESULT = re.compile(r"=\s{0,3}\$?([-−]?[\d,]*\.?\d+)(?![^\S\n]*[-+*/×÷·\d])")
_EXPRESSION = re.compile(r"[\d\s.,()+\-*/×÷·−$]+$")
_MARKER = re.compile(r"\s*(?:[-*•+]|\d{1,3}[.)])\s+")
_TAIL = re.compile(r"\s*(?:[+*/×÷·]|[-−]\s)")
_GLUED = re.compile(r"[\w^}%!]\S")


def _left_side(before: str) -> str:
    """The expression that ends a text, without the marker of a list; '' where it is the tail of one that is no arithmetic
    ("x + 3 + 4", "2^3 + 1"), whose value is not that of what is left of it."""
    line = before.rpartition("\n")[2]
    marker = _MARKER.match(line)
    line = line[marker.end() :] if marker else line
    found = _EXPRESSION.search(line)
    if found is None:
        return ""
    if found.start() and (_TAIL.match(found.group()) or _GLUED.match(line, found.start() - 1)):
        return ""
    return found.group().lstrip(" \t.,)*/×÷·").replace(",", "").replace("$", "")


@reward(
    "arithmetic_steps",
    range=(0, 1),
    aliases=["math_reasoning"],
    examples=[
        good("48 / 2 = 24, then 48 + 24 = 72."),
        bad("48 / 2 = 25, then 48 + 25 = 74."),
        adversarial("72 = 72, so 48 + 24 = 73.", 0.0, note="a number is no step"),
    ],
)
def arithmetic_steps(completion: str) -> float | None:
    """Share of the calculations written in the text ("48 / 2 = 24") that come out right; None without any.

    Results may be rounded to the digits shown. It checks the sums, not whether they answer the question.
    """
    outcomes = []
    text = re.sub(r"\\(?:times|cdot)(?![a-z])", "×", completion).replace("\\div", "÷")
    for match in _RESULT.finditer(text):
        computed = evaluate(_left_side(text[max(0, match.start() - 150) : match.start()]))
        written = answers.parse_number(match.group(1))
        if computed is None or written is None or len(computed[1]) < 2:
            continue
        digits = len(match.group(1).partition(".")[2])
        outcomes.append(abs(computed[0] - written) <= Fraction(1, 2 * 10**digits) if digits else computed[0] == written)
    return sum(outcomes) / len(outcomes) if outcomes else None
