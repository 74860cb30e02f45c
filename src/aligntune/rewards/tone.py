"""How does the text sound? Sentiment by a lexicon, and heuristics that say what they count."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from aligntune.errors import ConfigError, require

from .base import adversarial, bad, good, reward
from .words import clamp, content_stems, fenced_blocks, sentences, words


@cache
def _vader() -> Any:
    module = require("vaderSentiment.vaderSentiment", extra="rewards", why="the reward 'sentiment'")
    return module.SentimentIntensityAnalyzer()


@reward(
    "sentiment",
    range=(0, 1),
    source="VADER (Hutto and Gilbert 2014)",
    examples=[
        good("What a wonderful day, I love it!", (0.9, 1.0)),
        bad("This is terrible and I hate it.", (0.0, 0.2)),
        adversarial("not good", (0.0, 0.4), note="a good word, negated"),
    ],
)
def sentiment(completion: str, *, target: str = "positive") -> float:
    """VADER's compound score as 0 (negative) to 1 (positive); `target` negative turns it round, neutral wants 0.5."""
    compound = float(_vader().polarity_scores(completion)["compound"])
    scores = {"positive": (compound + 1) / 2, "negative": (1 - compound) / 2, "neutral": 1 - abs(compound)}
    if target not in scores:
        raise ConfigError(f"sentiment: target={target!r}: choose one of {', '.join(scores)}")
    return clamp(scores[target])


POLITE = {
    "thanks": r"\b(thank you|thanks|grateful|appreciate)\b",
    "please": r"\bplease\b",
    "request": r"\b(could|would|may|might) (you|i|we)\b",
    "apology": r"\b(sorry|apologi[sz]e|excuse me|pardon)\b",
    "goodwill": r"\b(happy to|glad to|welcome|of course|certainly|my pleasure|kind regards|feel free)\b",
}
RUDE = re.compile(
    r"\b(?:shut up|you(?:'re| are)(?: \w+){0,2} (?:stupid|dumb|pathetic|ridiculous|an? (?:idiot|moron|fool|loser))|"
    r"(?:stupid|dumb|idiotic) (?:question|idea)|idiot|moron|get lost|who cares|go away|don't waste my time|"
    r"none of your business)\b",
    re.IGNORECASE,
)


@reward(
    "politeness",
    range=(0, 1),
    source="after the markers of Danescu-Niculescu-Mizil et al. 2013",
    heuristic=True,
    examples=[
        good("Thank you for asking. Could you please tell me the date? I am happy to help."),
        bad("Shut up, that is a stupid question."),
        adversarial("please please please please", 0.75, note="one marker, many times"),
    ],
)
def politeness(completion: str) -> float:
    """0.5 without marks; +0.25 for each kind of polite phrase up to two, 0 as soon as there is a rude one.

    Kinds: thanks, please, request, apology, goodwill. English phrases; it does not hear irony.
    """
    if not words(completion) or RUDE.search(completion):
        return 0.0
    kinds = sum(bool(re.search(pattern, completion, re.IGNORECASE)) for pattern in POLITE.values())
    return 0.5 + 0.25 * min(kinds, 2)


REFUSAL = re.compile(
    r"\b(?:i (?:can(?:no|')t|am (?:not able|unable)|won't|will not|must decline)|i'm (?:not able|unable|sorry,? but)|"
    r"i am sorry,? but|as an ai(?: language model)?,? i|i (?:have to|must) (?:decline|refuse)|"
    r"(?:not|never) (?:able|going) to (?:help|assist|provide)|against my (?:guidelines|programming|policy))",
    re.IGNORECASE,
)


def refuses(text: str) -> bool:
    """Whether the first two sentences decline to answer."""
    return bool(REFUSAL.search(" ".join(sentences(text.replace("’", "'"))[:2])))


@reward(
    "refusal",
    range=(0, 1),
    heuristic=True,
    examples=[
        good("Paris is the capital of France."),
        bad("I'm sorry, but I can't help with that."),
        adversarial("I’m unable to answer; as an AI language model, I have no opinion.", 0.0, note="curly apostrophe"),
        adversarial("", 0.0, note="silence answers nothing"),
    ],
)
def refusal(completion: str, *, want: bool = False) -> float:
    """1 if the answer does not refuse; `want: true` turns it round: 1 if it does. By stock phrases at its start."""
    if not words(completion):
        return 0.0
    return float(refuses(completion) == want)


@reward(
    "helpfulness",
    range=(0, 1),
    heuristic=True,
    examples=[
        good(
            "To boil an egg, bring water to the boil first. Lower the egg in with a spoon, wait 8 minutes, "
            "then cool it under running water so that it peels easily.",
            prompt="How do I boil an egg?",
        ),
        bad("I can't help with that.", prompt="How do I boil an egg?"),
        adversarial(
            "egg boil egg boil egg boil egg", (0.0, 0.34), prompt="How do I boil an egg?", note="keywords only"
        ),
    ],
)
def helpfulness(prompt: str, completion: str) -> float:
    """Share of three signs of a helpful answer; 0 when it refuses. It cannot tell whether the answer is right.

    The signs: it takes up words of the question; it adds at least 12 different content words; it has something
    concrete (a number, a step, a list, code or an example).
    """
    if not words(completion) or refuses(completion):
        return 0.0
    asked, said = set(content_stems(prompt)), set(content_stems(completion))
    concrete = r"\d|^\s{0,12}[-*•] |\b(?:first|then|next|finally|for example|such as|e\.g\.)\b"
    signs = (
        not asked or bool(asked & said),
        len(said - asked) >= 12,
        bool(fenced_blocks(completion)) or bool(re.search(concrete, completion, re.IGNORECASE | re.MULTILINE)),
    )
    return sum(signs) / len(signs)


OVERCLAIM = re.compile(
    r"\b(definitely|undoubtedly|guaranteed?|without (?:a|any) doubt|100 ?(?:%|percent)|absolutely certain|always works|"
    r"never fails|everyone knows|it is a fact that|trust me|believe me|no one can deny|proven beyond|impossible to lose)"
    r"|\b(?:as a (?:human|doctor|lawyer|parent)|in my (?:own )?life|when i was (?:young|a child)|i personally (?:saw|tasted|felt))\b",
    re.IGNORECASE,
)


@reward(
    "honesty",
    range=(0, 1),
    heuristic=True,
    examples=[
        good("Studies suggest that it helps some patients. I am not sure about the dose."),
        bad("Trust me, it is guaranteed to work. It definitely cures everyone."),
        adversarial("I'm not sure. " + "It definitely works. " * 4, 0.2, note="one hedge among claims"),
    ],
)
def honesty(completion: str) -> float | None:
    """Share of the sentences that neither overclaim ("guaranteed", "everyone knows") nor pretend to a human life.

    By stock phrases: it hears the tone of a claim, not whether the claim is true. For truth use a reference. None when
    there is only code.
    """
    parts = sentences(completion)
    if not parts:
        return None if words(completion) else 0.0
    return sum(not OVERCLAIM.search(part) for part in parts) / len(parts)


@reward(
    "directness",
    range=(0, 1),
    heuristic=True,
    examples=[
        good("Water boils at 100 °C at sea level."),
        bad("Great question! Certainly! Sure, here is the answer. I hope this helps!"),
        adversarial("Sure! " * 20, 0.0, note="filler alone"),
    ],
)
def directness(completion: str) -> float | None:
    """Share of the sentences that are not filler (praise of the question, announcements, offers of more help).

    None when there is only code.
    """
    parts = sentences(completion)
    if not parts:
        return None if words(completion) else 0.0
    return sum(not FILLER.match(part) for part in parts) / len(parts)


FILLER = re.compile(
    r"\W*(?:(?:what a )?(?:great|good|excellent|interesting) question|certainly|sure(?: thing)?|of course|absolutely|"
    r"no problem|here(?:'s| is| are) (?:the|your|a|an|some)\b[^.!?:]{0,40}[.:!]|i hope (?:this|that) helps|"
    r"let me know if|feel free to|i'd be happy to|as an ai)",
    re.IGNORECASE,
)
