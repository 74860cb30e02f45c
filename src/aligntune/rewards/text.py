"""How is the text shaped? Length, repetition, variety, layout, keywords. No reference is needed."""

from __future__ import annotations

from typing import Any

from aligntune.errors import ConfigError

from .base import adversarial, bad, good, reward
from .words import (
    clamp,
    ngrams,
    paragraphs,
    words,
)

PLAIN = "The river rises in spring. Its water comes from snow that melts in the hills, so the fields below stay green."


def _size(text: str, unit: str, completion_ids: Any, tokenizer: Any) -> int:
    if unit == "words":
        return len(words(text))
    if unit == "chars":
        return len(text)
    if unit != "tokens":
        raise ConfigError(f"unit={unit!r}: choose words, chars or tokens")
    if completion_ids is not None:
        return len(completion_ids)
    if tokenizer is None:
        raise ConfigError("unit='tokens' needs a tokenizer or completion_ids; here use unit='words'")
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@reward(
    "length",
    range=(0, 1),
    examples=[
        good("one two three four five", params={"min_length": 3, "max_length": 6}),
        bad("one", 1 / 3, params={"min_length": 3, "max_length": 6}),
        bad("w " * 9, 0.5, params={"min_length": 3, "max_length": 6}),
        adversarial("... !!! ???", 0.0, params={"min_length": 3, "max_length": 6}, note="marks are not words"),
    ],
)
def length(
    completion: str,
    completion_ids: Any = None,
    tokenizer: Any = None,
    *,
    min_length: int = 10,
    max_length: int = 200,
    unit: str = "words",
) -> float:
    """1 with min_length to max_length words (chars, tokens); falls linearly to 0 at none and at twice the maximum."""
    if not 0 <= min_length <= max_length or max_length == 0:
        raise ConfigError(f"length: min_length={min_length} and max_length={max_length} leave no length to reward")
    size = _size(completion, unit, completion_ids, tokenizer)
    if size < min_length:
        return size / min_length
    return clamp(2 - size / max_length)


@reward(
    "brevity",
    range=(0, 1),
    aliases=["conciseness"],
    examples=[
        good("Paris.", params={"max_length": 20}),
        bad("word " * 21, params={"max_length": 20}),
        adversarial("", 0.0, note="saying nothing is not brief"),
    ],
)
def brevity(completion: str, completion_ids: Any = None, tokenizer: Any = None, *, max_length: int = 100, unit: str = "words") -> float:  # fmt: skip
    """1 for one word, falling linearly to 0 at more than max_length words (chars, tokens); 0 for an empty answer."""
    size = _size(completion, unit, completion_ids, tokenizer)
    return clamp(1 - (size - 1) / max_length) if size else 0.0


@reward(
    "overlong",
    range=(-1, 0),
    source="DAPO, arXiv 2503.14476, eq. 13 (soft overlong punishment)",
    aliases=["soft_overlong"],
    examples=[
        good("a b c", 0.0, params={"max_length": 10, "cache_length": 4, "unit": "words"}),
        bad("w " * 8, -0.5, params={"max_length": 10, "cache_length": 4, "unit": "words"}),
        adversarial("w " * 500, -1.0, params={"max_length": 10, "cache_length": 4, "unit": "words"}),
    ],
)
def overlong(
    completion: str,
    completion_ids: Any = None,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    cache_length: int | None = None,
    unit: str = "tokens",
) -> float:
    """0 up to max_length - cache_length tokens, then linearly down to -1 at max_length. Unset cache: a fifth."""
    if max_length is None:
        raise ConfigError("overlong needs params: {max_length: ...}, the longest completion of the run")
    cache_size = max_length // 5 if cache_length is None else cache_length
    size = _size(completion, unit, completion_ids, tokenizer)
    if size <= max_length - cache_size:
        return 0.0
    return clamp((max_length - cache_size - size) / cache_size, -1, 0) if cache_size else -1.0


@reward(
    "repetition",
    range=(0, 1),
    source="Yeo et al. 2025, arXiv 2502.03373 (n-gram repetition penalty)",
    aliases=["non_repetition"],
    examples=[
        good(PLAIN),
        bad("yes yes yes yes yes yes yes yes", (0.0, 0.2)),
        adversarial("", 0.0, note="an empty answer repeats nothing and earns nothing"),
    ],
)
def repetition(completion: str, *, order: int = 3) -> float:
    """Share of the word n-grams (n = order) that are different from one another; 1 is no repetition."""
    tokens = words(completion)
    grams = ngrams(tokens, order)
    return len(set(grams)) / len(grams) if grams else float(bool(tokens))


@reward(
    "diversity",
    range=(0, 1),
    source="Covington and McFall 2010 (moving-average type-token ratio)",
    examples=[
        good("red green blue yellow purple brown black white"),
        bad("word " * 40, (0.0, 0.05)),
        adversarial("one two three four five " * 30, (0.0, 0.11), note="a varied phrase, repeated"),
    ],
)
def diversity(completion: str, *, window: int = 50) -> float:
    """Mean share of different words in every window of that many words, so that long texts are not punished."""
    tokens = words(completion)
    if len(tokens) <= window:
        return len(set(tokens)) / len(tokens) if tokens else 0.0
    counts: dict[str, int] = {}
    for token in tokens[:window]:
        counts[token] = counts.get(token, 0) + 1
    total = len(counts)
    for leaving, entering in zip(tokens, tokens[window:], strict=False):
        counts[leaving] -= 1
        if not counts[leaving]:
            del counts[leaving]
        counts[entering] = counts.get(entering, 0) + 1
        total += len(counts)
    return total / (len(tokens) - window + 1) / window


@reward(
    "structure",
    range=(0, 1),
    heuristic=True,
    examples=[
        good(
            "First we boil the water.\n\nThen we add the tea leaves:\n- two spoons of black tea\n- one of mint leaves"
        ),
        bad("word " * 300),
        adversarial("a\n\nb\n\nc\n\nd", 0.0, note="a break after every word is no structure"),
    ],
)
def structure(completion: str, *, max_paragraph: int = 120, min_paragraph: int = 3) -> float:
    """Share of the words that stand in paragraphs or list items of 3 to 120 words; layout only, not content."""
    sizes = [len(words(block)) for block in paragraphs(completion)]
    fitting = sum(size for size in sizes if min_paragraph <= size <= max_paragraph)
    return fitting / sum(sizes) if sizes else 0.0


@reward(
    "keywords",
    range=(0, 1),
    examples=[
        good("The cat chased the dog.", keywords=["cat", "dog"]),
        bad("The cat slept.", 0.5, keywords=["cat", "dog"]),
        adversarial("Concatenate the dogma.", 0.0, keywords=["cat", "dog"], note="inside other words"),
    ],
)
def keywords(completion: str, keywords: list[str]) -> float | None:
    """Share of the column's keywords that occur as whole words, in any case; None without keywords."""
    if not keywords:
        return None
    text = f" {' '.join(words(completion))} "
    return sum(f" {' '.join(words(keyword))} " in text for keyword in keywords) / len(keywords)
