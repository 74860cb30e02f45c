"""How close is the completion to a reference text? N-gram metrics, embeddings, and shared facts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from aligntune.errors import ConfigError

from . import answers
from .base import adversarial, bad, good, reward
from .samples import Text, completion_text
from .words import FUNCTION_WORDS, clamp, words


def _texts(completions: Sequence[Text]) -> list[str]:
    return [completion_text(completion) for completion in completions]


def _references(reference: Sequence[Any]) -> list[list[str]]:
    return [answers.alternatives(option) for option in reference]


@reward(
    "bleu",
    range=(0, 1),
    source="sacrebleu (Post 2018), sentence BLEU with exponential smoothing",
    examples=[
        good("The cat sat on the mat by the door.", reference="The cat sat on the mat by the door."),
        bad("Nothing of the kind.", (0.0, 0.1), reference="The cat sat on the mat by the door."),
        adversarial("the the the the the the the", (0.0, 0.1), reference="The cat sat on the mat by the door."),
    ],
)
def bleu(completions: list[Text], reference: list[Any], *, tokenize: str = "13a") -> list[float]:
    """Sentence BLEU / 100 against the reference (or the best of several)."""
    from aligntune.textmetrics import sentence_bleu

    return [score / 100 for score in sentence_bleu(_texts(completions), _references(reference), tokenize=tokenize)]


@reward(
    "rouge",
    range=(0, 1),
    source="Lin 2004, by rouge-score",
    examples=[
        good("the cat sat on the mat", reference="the cat sat on the mat"),
        bad("dogs bark loudly", reference="the cat sat on the mat"),
        adversarial("the cat sat on the mat " * 10, (0.0, 0.2), reference="the cat sat on the mat", note="padding"),
    ],
)
def rouge(completions: list[Text], reference: list[Any], *, variant: str = "rougeL", stemmer: bool = False) -> list[float]:  # fmt: skip
    """ROUGE F1 (rouge1, rouge2, rougeL or rougeLsum) against the reference, the best of several."""
    from aligntune.textmetrics import rouge as score

    return score(_texts(completions), _references(reference), types=[variant], use_stemmer=stemmer)[variant]


@reward(
    "meteor",
    range=(0, 1),
    source="Banerjee and Lavie 2005; synonyms only where WordNet is installed",
    examples=[
        good("the cat sat on the mat", (0.99, 1.0), reference="the cat sat on the mat"),
        bad("dogs bark loudly", reference="the cat sat on the mat"),
        adversarial("mat the on sat cat the", (0.0, 0.6), reference="the cat sat on the mat", note="words shuffled"),
    ],
)
def meteor(completions: list[Text], reference: list[Any]) -> list[float]:
    """METEOR: matched words and stems, recall weighed over precision, less a penalty for broken order."""
    from aligntune.textmetrics import meteor as score

    return score(_texts(completions), _references(reference))


@cache
def _encoder(model: str, device: str | None) -> Any:
    from aligntune.textmetrics import load_encoder

    return load_encoder(model, device=device)


def _named_encoder(model: str | None, device: str | None, name: str) -> Any:
    if model is None:
        raise ConfigError(
            f"{name} needs params: {{model: ...}}, the folder or hub name of an encoder, for example "
            "sentence-transformers/all-MiniLM-L6-v2"
        )
    return _encoder(model, device)


ENCODER = {"model": "<encoder>", "device": "cpu"}  # tests put a real folder in its place


@reward(
    "similarity",
    range=(-1, 1),
    source="Reimers and Gurevych 2019: cosine of mean-pooled embeddings",
    aliases=["semantic_similarity"],
    examples=[
        good("the cat sat", params=ENCODER, reference="the cat sat"),
        bad("quickly and then blue", (-1.0, 0.99), params=ENCODER, reference="the cat sat"),
        adversarial("", (-1.0, 0.99), params=ENCODER, reference="the cat sat", note="no text"),
    ],
)
def similarity(
    completions: list[Text], reference: list[Any], *, model: str | None = None, device: str | None = None
) -> list[float]:
    """Cosine similarity of the embeddings of answer and reference, the best of several."""
    from aligntune.textmetrics import semantic_similarity

    encoder = _named_encoder(model, device, "similarity")
    return [clamp(score, -1, 1) for score in semantic_similarity(_texts(completions), _references(reference), encoder)]


@reward(
    "bertscore",
    range=(-1, 1),
    source="Zhang et al. 2020, arXiv 1904.09675, F1",
    examples=[
        good("the cat sat", params=ENCODER, reference="the cat sat"),
        bad("quickly and then blue", (-1.0, 0.9), params=ENCODER, reference="the cat sat"),
        adversarial("", 0.0, params=ENCODER, reference="the cat sat", note="no text"),
    ],
)
def bertscore(
    completions: list[Text],
    reference: list[Any],
    *,
    model: str | None = None,
    device: str | None = None,
    layer: int | None = None,
) -> list[float]:
    """BERTScore F1 of answer and reference, the best of several, without baseline rescaling."""
    from aligntune.textmetrics import bertscore as score

    encoder = _named_encoder(model, device, "bertscore")
    found = score(_texts(completions), _references(reference), encoder, layer=layer)["f1"]
    return [clamp(value, -1, 1) for value in found]


_NAME = re.compile(r"(?<![.!?:\n]\s)(?<!^)(?<![\w'])[A-Z][\w'’-]*[a-z][\w'’-]*", re.MULTILINE)


def _facts(text: str) -> set[str]:
    """Numbers and names (capitalised words inside sentences): what a statement can be checked on."""
    names = {name.casefold() for name in _NAME.findall(text)}
    return {str(number) for number in answers.numbers(text)} | (names - FUNCTION_WORDS)


@reward(
    "factuality",
    range=(0, 1),
    heuristic=True,
    examples=[
        good("It opened in 1889 and was designed by Gustave Eiffel.", reference="Built by Gustave Eiffel, it opened in 1889."),
        bad("It opened in 1920 and was designed by Frank Lloyd.", reference="Built by Gustave Eiffel, it opened in 1889."),
        adversarial("It is certainly a very well known fact.", 0.0, reference="Built by Gustave Eiffel, it opened in 1889.", note="assurance without facts"),
    ],
)  # fmt: skip
def factuality(completion: str, reference: Any) -> float | None:
    """F1 of the numbers and names that answer and reference share; None when the reference has none.

    It compares items, not statements: "not in 1889" agrees with "in 1889". For meaning use the reward `judge`.
    """
    wanted = _facts("\n".join(answers.alternatives(reference)))
    if not wanted:
        return None
    said = _facts(completion) | (wanted & set(words(completion)))  # a name may open a sentence
    shared = len(said & wanted)
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


@reward(
    "faithfulness",
    range=(0, 1),
    heuristic=True,
    aliases=["hallucination", "groundedness"],
    examples=[
        good("The tower opened in 1889.", context="The tower, by Gustave Eiffel, opened in 1889."),
        bad("In 1950 it was moved to London by Smith.", context="The tower, by Gustave Eiffel, opened in 1889."),
        adversarial("In 1889, Eiffel and 1950, 1951, 1952", (0.0, 0.5), context="The tower, by Gustave Eiffel, opened in 1889.", note="one right item among invented ones"),
    ],
)  # fmt: skip
def faithfulness(completion: str, context: str) -> float | None:
    """Share of the answer's numbers and names that the column `context` has; None when the answer has none.

    1 is no item out of thin air. It does not see whether the items are put together rightly.
    """
    said = _facts(completion)
    if not said:
        return None
    known = _facts(context) | set(words(context))
    return sum(fact in known for fact in said) / len(said)
