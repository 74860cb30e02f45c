"""A small verifiable task, generated from a seed: say the words backwards.

user: backwards: sun cat red
assistant: red cat sun
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "ant",
    "bear",
    "bee",
    "cat",
    "cow",
    "dog",
    "duck",
    "fish",
    "fox",
    "frog",
    "goat",
    "hen",
    "horse",
    "lamb",
    "lion",
    "mouse",
    "owl",
    "pig",
    "seal",
    "wolf",
    "red",
    "blue",
    "green",
    "gold",
    "black",
    "white",
    "pink",
    "grey",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
]
LENGTHS = (3, 4)
"""Words in a question."""
CARELESS = 0.3
"""Share of the demonstrations that are wrong on purpose, so that fine-tuning on them leaves something for RL to mend."""


def question(words: list[str]) -> str:
    return "backwards: " + " ".join(words)


def backwards(words: list[str]) -> str:
    return " ".join(reversed(words))


def lists(count: int, seed: int, exclude: frozenset[tuple[str, ...]] = frozenset()) -> list[list[str]]:
    """`count` different lists of different words, none of them in `exclude`."""
    draw = random.Random(seed)
    seen = set(exclude)
    found: list[list[str]] = []
    while len(found) < count:
        words = tuple(draw.sample(WORDS, draw.choice(LENGTHS)))
        if words not in seen:
            seen.add(words)
            found.append(list(words))
    return found


def held_out(count: int = 200) -> list[list[str]]:
    """The lists that are asked in evaluations and never trained on."""
    return lists(count, seed=1_000_003)


def rows(words: list[list[str]]) -> list[dict[str, Any]]:
    """Conversations, with the answer in a column of its own for rewards."""
    return [
        {
            "prompt": [{"role": "user", "content": question(item)}],
            "completion": [{"role": "assistant", "content": backwards(item)}],
            "answer": backwards(item),
        }
        for item in words
    ]


def careless(demonstrations: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Demonstrations of which `CARELESS` repeat the words in the order in which they were given."""
    draw = random.Random(seed)
    for row in demonstrations:
        if draw.random() < CARELESS:
            row["completion"] = [{"role": "assistant", "content": " ".join(reversed(row["answer"].split()))}]
    return demonstrations


def write(folder: Path, train: int, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl; no held-out list is trained on."""
    kept = held_out()
    training = lists(train, seed, frozenset(tuple(words) for words in kept))
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, (careless(rows(training), seed), rows(kept)), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths


def in_place(completion: str, answer: str) -> float:
    """Share of the answer's words that stand at their place: 1 for the right answer, 0 for none."""
    said, wanted = completion.split(), answer.split()
    right = sum(one == other for one, other in zip(said, wanted, strict=False))
    return right / max(len(said), len(wanted), 1)


def accuracy(answers: list[str], words: list[list[str]]) -> float:
    """Share of lists whose answer is right, word for word."""
    return sum(said.split() == list(reversed(item)) for said, item in zip(answers, words, strict=True)) / len(words)
