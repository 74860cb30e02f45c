"""How alike are two programs? CodeBLEU: tokens, keywords, syntax trees and data flow.

Ren et al. 2020 (arXiv 2009.10297). Four matches, weighted 0.25 each:

    n-gram           BLEU of the tokens, up to 4-grams
    weighted n-gram  n-gram recall with keywords at weight 1 and other words at 0.2
    syntax           share of the reference's syntax subtrees that the prediction has
    data flow        share of the reference's data-flow edges that the prediction has

The counts are those of the authors' own code, on which all published numbers rest, where the paper's text differs
(weighted n-gram: recall over 1- to 4-grams without a brevity penalty, not unigram precision; syntax: a subtree counts
if the prediction has it at all). Deviations: tokens are the parser's, not runs of non-blanks (the same on the
spaced-out code of the paper's data sets); comments and docstrings count nowhere; without any data flow in the
references the other three share its weight, and a data-flow match of 0 stays 0 (their code takes both as 1).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from aligntune.errors import ConfigError
from aligntune.textmetrics.code_trees import language as language_table
from aligntune.textmetrics.code_trees import parse, subtrees, text, tokens
from aligntune.textmetrics.dataflow import data_flow
from aligntune.textmetrics.rows import Reference, reference_lists

ORDERS = 4
_SMOOTHING = 0.1
_FENCE = re.compile(r"^```[^\n]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
Tokens = list[str]


@dataclass(frozen=True)
class CodeBleu:
    """A score and its four parts, each in [0, 1]; `dataflow_match` is None where the references have no data flow."""

    codebleu: float
    ngram_match: float
    weighted_ngram_match: float
    syntax_match: float
    dataflow_match: float | None

    def as_dict(self) -> dict[str, float]:
        """The parts that exist, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def codebleu(
    predictions: Sequence[str],
    references: Sequence[Reference],
    language: str | Sequence[str] = "python",
    *,
    weights: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25),
    tokenize: Callable[[str], Tokens] | None = None,
) -> CodeBleu:
    """CodeBLEU of a corpus of `language` code (one name, or one a row); call it with one row for a single program.

    `weights` are those of the four matches and sum to 1. `tokenize` replaces the parser's tokens in the two n-gram
    matches (`str.split` is what the authors use).
    """
    if len(weights) != 4 or min(weights) < 0 or not math.isclose(sum(weights), 1):
        raise ConfigError(f"CodeBLEU's weights are four numbers that sum to 1, not {weights}")
    rows = reference_lists(predictions, references)
    languages = [language] * len(rows) if isinstance(language, str) else list(language)
    if len(languages) != len(rows):
        raise ConfigError(f"CodeBLEU got {len(languages)} languages for {len(rows)} rows: give one, or one a row")
    split = _lexemes if tokenize is None else (lambda code, _: tokenize(code))
    left = [split(code, name) for code, name in zip(predictions, languages, strict=True)]
    right = [[split(code, name) for code in row] for row, name in zip(rows, languages, strict=True)]
    ngram = _bleu(left, right)
    weighted = _weighted_bleu(left, right, languages)
    syntax = _syntax_match(predictions, rows, languages)
    dataflow = _dataflow_match(predictions, rows, languages)
    parts = [ngram, weighted, syntax] + ([] if dataflow is None else [dataflow])
    share = sum(weights[: len(parts)])
    score = sum(weight * part for weight, part in zip(weights, parts, strict=False)) / share if share else 0.0
    return CodeBleu(score, ngram, weighted, syntax, dataflow)


def extract_code(answer: str) -> str:
    """The fenced code blocks of a chat answer, joined; the whole answer if it has none."""
    blocks = _FENCE.findall(answer)
    return "\n".join(block.rstrip("\n") for block in blocks) if blocks else answer


def _lexemes(code: str, name: str) -> Tokens:
    return [text(node) for node in tokens(parse(code, name))]


def _ngrams(words: Tokens, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[at:] for at in range(order)), strict=False))


def _bleu(predictions: list[Tokens], references: list[list[Tokens]]) -> float:
    matched, total = [0.0] * ORDERS, [0.0] * ORDERS
    for words, row in zip(predictions, references, strict=True):
        for order in range(1, ORDERS + 1):
            counts = _ngrams(words, order)
            most = Counter[tuple[str, ...]]()
            for reference in row:
                most |= _ngrams(reference, order)
            matched[order - 1] += (counts & most).total()
            total[order - 1] += max(1, counts.total())
    return _brevity_penalty(predictions, references) * _mean_precision(matched, total)


def _weighted_bleu(predictions: list[Tokens], references: list[list[Tokens]], languages: list[str]) -> float:
    matched, total = [0.0] * ORDERS, [0.0] * ORDERS
    for words, row, name in zip(predictions, references, languages, strict=True):
        keywords = language_table(name).keywords
        for order in range(1, ORDERS + 1):
            counts = _ngrams(words, order)
            for reference in row:
                wanted = _ngrams(reference, order)
                weight = {gram: 1.0 if order > 1 or gram[0] in keywords else 0.2 for gram in wanted}
                matched[order - 1] += sum(count * weight[gram] for gram, count in (wanted & counts).items())
                total[order - 1] += max(1, sum(count * weight[gram] for gram, count in wanted.items()))
    return _mean_precision(matched, total)


def _mean_precision(matched: list[float], total: list[float]) -> float:
    """Geometric mean over the orders; one without matches counts 0.1 of a match (Chen and Cherry 2014, method 1)."""
    if matched[0] == 0:
        return 0.0
    logs = [math.log((hits or _SMOOTHING) / count) for hits, count in zip(matched, total, strict=True)]
    return math.exp(math.fsum(logs) / ORDERS)


def _brevity_penalty(predictions: list[Tokens], references: list[list[Tokens]]) -> float:
    length = sum(map(len, predictions))
    closest = 0
    for words, row in zip(predictions, references, strict=True):
        closest += min((abs(len(reference) - len(words)), len(reference)) for reference in row)[1]
    return 1.0 if length > closest else math.exp(1 - closest / length) if length else 0.0


def _syntax_match(predictions: Sequence[str], references: list[list[str]], languages: list[str]) -> float:
    matched = total = 0
    for code, row, name in zip(predictions, references, languages, strict=True):
        numbers: dict[tuple[object, ...], int] = {}
        found = set(subtrees(parse(code, name), numbers))
        for reference in row:
            wanted = subtrees(parse(reference, name), numbers)
            matched += sum(shape in found for shape in wanted)
            total += len(wanted)
    return matched / total


def _dataflow_match(predictions: Sequence[str], references: list[list[str]], languages: list[str]) -> float | None:
    matched = total = 0
    for code, row, name in zip(predictions, references, languages, strict=True):
        found = Counter(data_flow(code, name))
        for reference in row:
            wanted = Counter(data_flow(reference, name))
            matched += (wanted & found).total()
            total += wanted.total()
    return matched / total if total else None
