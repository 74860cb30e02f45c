"""Can a reward be trusted on this dataset? Its gold answers must score full marks, and wrong ones must not.

The core of `aligntune reward test`. Wrong answers are made from the gold ones: those of other rows (shuffled), cut in
half, with changed numbers, and empty; each is compared on the rows where it differs from the gold answer.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aligntune.errors import DataError

from .call import Score
from .combine import RewardSet
from .samples import Text, completion_text

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Distribution:
    """Scores of one reward on one kind of answer. `quantiles`: minimum, quartiles, maximum; empty without scores."""

    count: int
    nulls: int
    mean: float | None
    quantiles: tuple[float, ...]
    histogram: tuple[int, ...] = ()

    @classmethod
    def of(cls, scores: Sequence[Score], low: float | None, high: float | None) -> Distribution:
        present = sorted(score for score in scores if score is not None)
        if not present:
            return cls(0, len(scores), None, ())
        picked = tuple(present[min(len(present) - 1, round(q * (len(present) - 1)))] for q in QUANTILES)
        start, stop = (present[0] if low is None else low), (present[-1] if high is None else high)
        width = (stop - start) / 10 or 1.0
        bins = [0] * 10
        for score in present:
            bins[min(9, max(0, int((score - start) / width)))] += 1
        return cls(len(present), len(scores) - len(present), math.fsum(present) / len(present), picked, tuple(bins))


@dataclass(frozen=True)
class Finding:
    """A row on which the reward is not what it should be."""

    row: int
    kind: str
    score: Score
    completion: str


@dataclass
class Check:
    """One reward's result: `full` is the score that gold answers must reach, None when the reward has no maximum."""

    name: str
    full: float | None
    distributions: dict[str, Distribution] = field(default_factory=dict)
    gold_below_full: list[Finding] = field(default_factory=list)
    wrong_at_full: list[Finding] = field(default_factory=list)
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem


def _other_row(golds: Sequence[str], generator: random.Random) -> list[str]:
    order = list(range(len(golds)))
    generator.shuffle(order)
    shift = {row: order[(place + 1) % len(order)] for place, row in enumerate(order)}
    return [golds[shift[row]] for row in range(len(golds))]


def _changed_numbers(golds: Sequence[str], generator: random.Random) -> list[str]:
    def bump(match: re.Match[str]) -> str:
        return str(int(match.group()) + generator.randint(1, 9))

    return [re.sub(r"(?<!\d)\d{1,15}(?!\d)", bump, text) for text in golds]


WRONG: dict[str, Callable[[Sequence[str], random.Random], list[str]]] = {
    "other row": _other_row,
    "cut in half": lambda golds, generator: [text[: len(text) // 2] for text in golds],
    "changed numbers": _changed_numbers,
    "empty": lambda golds, generator: [""] * len(golds),
}


def validate(
    rewards: RewardSet,
    prompts: Sequence[Text],
    golds: Sequence[Text],
    columns: Mapping[str, Sequence[Any]],
    *,
    seed: int = 0,
    tolerance: float = 1e-6,
    max_wrong_at_full: float = 0.05,
    keep: int = 5,
) -> list[Check]:
    """Run every reward over the gold answers and over wrong ones; one `Check` per reward.

    A reward fails when a gold answer scores below its maximum (or, without one, when gold answers do not score above
    the wrong ones on average), when it applies to no gold answer, or when more than `max_wrong_at_full` of the answers
    of other rows score full marks. Raises `DataError` for fewer than two rows.
    """
    if len(golds) < 2:
        raise DataError(f"reward test needs at least 2 rows to compare answers of different rows, got {len(golds)}")
    generator = random.Random(seed)
    texts = [completion_text(gold) for gold in golds]
    answers: dict[str, Sequence[Text]] = {"gold": golds}
    answers |= {kind: make(texts, generator) for kind, make in WRONG.items()}
    checks = [Check(entry.name, entry.reward.range[1]) for entry in rewards.entries]
    for kind, completions in answers.items():
        scores = rewards.score(prompts, completions, columns, update=False)
        for check, entry in zip(checks, rewards.entries, strict=True):
            raw = scores.by_reward[entry.name].raw
            rows = [
                row for row in range(len(golds)) if kind == "gold" or completion_text(completions[row]) != texts[row]
            ]
            _take(check, kind, rows, raw, completions, entry.reward.range, tolerance)
    for check in checks:
        check.problem = _problem(check, max_wrong_at_full)
        del check.gold_below_full[keep:], check.wrong_at_full[keep:]
    return checks


def _take(
    check: Check, kind: str, rows: list[int], raw: Sequence[Score], completions: Sequence[Text], bounds: Any, tolerance: float
) -> None:  # fmt: skip
    check.distributions[kind] = Distribution.of([raw[row] for row in rows], *bounds)
    if check.full is None:
        return
    for row in rows:
        score = raw[row]
        at_full = score is not None and score >= check.full - tolerance
        found = Finding(row, kind, score, completion_text(completions[row])[:200])
        if kind == "gold" and score is not None and not at_full:
            check.gold_below_full.append(found)
        elif kind == "other row" and at_full:
            check.wrong_at_full.append(found)


def _problem(check: Check, max_wrong_at_full: float) -> str:
    gold, wrong = check.distributions["gold"], check.distributions["other row"]
    if not gold.count:
        return "it applies to no gold answer (every score is None)"
    if check.full is None:
        higher = wrong.mean is None or (gold.mean is not None and gold.mean > wrong.mean)
        return "" if higher else f"gold answers do not score above those of other rows ({gold.mean} and {wrong.mean})"
    if check.gold_below_full:
        share = len(check.gold_below_full) / gold.count
        first = check.gold_below_full[0]
        return f"{share:.1%} of the gold answers score below {check.full:g}; the first is row {first.row} with {first.score}"
    if wrong.count and len(check.wrong_at_full) / wrong.count > max_wrong_at_full:
        share = len(check.wrong_at_full) / wrong.count
        return f"{share:.1%} of the answers of other rows score full marks too: it does not tell answers apart"
    return ""
