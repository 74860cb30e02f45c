"""How does the text read? Readability, language, and surface signs of coherence, fluency and relevance."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

from aligntune.errors import ConfigError, require

from .base import adversarial, bad, good, reward
from .text import PLAIN
from .words import FUNCTION_WORDS, clamp, content_stems, sentences, words


@cache
def _hyphens(language: str) -> Any:
    return require("pyphen", extra="rewards", why="the reward 'readability'").Pyphen(lang=language)


@reward(
    "readability",
    range=(0, 1),
    source="Flesch 1948 (reading ease); syllables by hyphenation patterns",
    heuristic=True,
    examples=[
        good("The cat sat on the mat. The dog ran to the door. We all had a good day.", (0.95, 1.0)),
        bad(
            "Notwithstanding methodological considerations, institutional reconfiguration necessitates "
            "interdisciplinary collaboration.",
            (0.0, 0.1),
        ),
        adversarial("?!. ... !!!", 0.0, note="no words at all"),
    ],
)
def readability(completion: str, *, language: str = "en_US") -> float:
    """Flesch reading ease / 100, limited to [0, 1]: short sentences of short words; it knows nothing of sense."""
    tokens, count = words(completion), len(sentences(completion))
    if not tokens or not count:
        return 0.0
    dictionary = _hyphens(language)
    syllables = sum(len(dictionary.positions(token[:40])) + 1 for token in tokens)
    return clamp((206.835 - 1.015 * len(tokens) / count - 84.6 * syllables / len(tokens)) / 100)


@cache
def _identifier() -> Any:
    langid = require("py3langid.langid", extra="rewards", why="the reward 'language'")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


@reward(
    "language",
    range=(0, 1),
    source="py3langid (Lui and Baldwin 2012)",
    examples=[
        good("The weather is lovely today and we are going to the beach.", (0.9, 1.0), params={"language": "en"}),
        bad("Das Wetter ist heute schön und wir gehen an den Strand.", (0.0, 0.1), params={"language": "en"}),
        adversarial("12345 67890 !!!", 0.0, params={"language": "en"}, note="no letters, no language"),
    ],
)
def language(completion: str, *, language: str = "en") -> float:
    """Probability that the text is in that language (ISO 639-1 code)."""
    identifier = _identifier()
    if not any(character.isalpha() for character in completion):
        return 0.0
    scores = dict(identifier.rank(completion))
    if language not in scores:
        raise ConfigError(f"language={language!r} is none of the {len(scores)} known: {', '.join(sorted(scores))}")
    return clamp(float(scores[language]))


@reward(
    "coherence",
    range=(0, 1),
    source="after Foltz et al. 1998 (overlap of adjacent sentences), with word stems in place of LSA",
    heuristic=True,
    examples=[
        good("The bridge was built in 1890. The bridge still carries trains. Many of the trains are old."),
        bad("Bananas ripen quickly. Copper conducts electricity. Mozart wrote operas."),
        adversarial(
            "The bridge is old. The bridge is old. The bridge is old.", 0.0, note="saying it again adds nothing"
        ),
    ],
)
def coherence(completion: str) -> float | None:
    """Share of adjacent sentences that take up a content word (or a pronoun or connective) and add something.

    None with fewer than two sentences. It sees links on the surface, not whether the argument holds.
    """
    parts = sentences(completion)
    if len(parts) < 2:
        return None
    linked = sum(_linked(left, right) for left, right in itertools.pairwise(parts))
    return linked / (len(parts) - 1)


_LINKS = (
    "he she it they this that these those such its their his her then therefore thus so however but also because "
    "instead finally first second third next still moreover meanwhile otherwise consequently "
)
LINKS = frozenset(_LINKS.split())


def _linked(left: str, right: str) -> bool:
    before, after = set(content_stems(left)), set(content_stems(right))
    adds = bool(after - before)
    return adds and (bool(before & after) or bool(LINKS & set(words(right)[:3])))


@reward(
    "fluency",
    range=(0, 1),
    heuristic=True,
    examples=[
        good(PLAIN),
        bad("river rises spring water snow hills fields green melt melt melt", (0.0, 0.3)),
        adversarial("The the of of and and to to the the.", (0.0, 0.6), note="function words without content"),
    ],
)
def fluency(completion: str) -> float | None:
    """The least of three surface signs of English prose: sentence marks, function words, no doubled words.

    Sentence marks: share of sentences with a capital (or digit) in front and an end mark. Function words: their share,
    full marks from 25 % to 65 %. Doubled words: 1 - 5 x their share. It cannot tell grammar from its look. Code blocks
    are left out; None when there is nothing else.
    """
    parts = sentences(completion)
    tokens = words(" ".join(parts))
    if not parts:
        return None if words(completion) else 0.0
    marked = sum(
        part.lstrip("\"'(*-•# ")[:1].isupper() or part[:1].isdigit() for part in parts if part[-1] in ".!?…:\"')`"
    )
    function = sum(token in FUNCTION_WORDS for token in tokens) / len(tokens)
    doubled = sum(left == right for left, right in itertools.pairwise(tokens)) / len(tokens)
    balance = min(clamp(function / 0.25), clamp((1 - function) / 0.35))
    return min(marked / len(parts), balance, clamp(1 - 5 * doubled))


@reward(
    "relevance",
    range=(0, 1),
    heuristic=True,
    aliases=["context_relevance"],
    examples=[
        good("Bees visit flowers for nectar and turn it into honey in the hive.", (0.6, 1.0), prompt="How do bees make honey from flowers?"),
        bad("The stock market fell sharply.", prompt="How do bees make honey?"),
        adversarial("How do bees make honey?", 0.0, prompt="How do bees make honey?", note="the question, copied"),
    ],
)  # fmt: skip
def relevance(prompt: str, completion: str) -> float | None:
    """Share of the prompt's content words that the answer takes up; 0 when it adds no content word of its own.

    None for a prompt without content words. Word overlap only: a paraphrase scores low, an off-topic echo high.
    """
    asked, said = set(content_stems(prompt)), set(content_stems(completion))
    if not asked:
        return None
    return len(asked & said) / len(asked) if said - asked else 0.0
