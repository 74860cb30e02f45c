"""How many words do two texts share? ROUGE (rouge-score) and BLEU (sacrebleu).

ROUGE: Lin 2004, computed by Google's `rouge-score`. That package splits text at everything but a-z and 0-9, so it
gives every Chinese or Russian answer 0. Here a word is a run of Unicode letters and digits, and each Chinese or
Japanese character is a word of its own; on text whose letters and digits are ASCII the scores are those of
`rouge-score`.

BLEU: Papineni et al. 2002 by `sacrebleu`, on its scale of 0 to 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from aligntune.textmetrics.rows import Reference, reference_lists

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class _UnicodeWords:
    """Tokenizer for `rouge_score`; stems words of more than three characters, as its own tokenizer does."""

    def __init__(self, use_stemmer: bool) -> None:
        import regex
        from nltk.stem.porter import PorterStemmer

        unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}"
        self._word = regex.compile(rf"[{unspaced}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{unspaced}]]+", regex.V1)
        self._stem = PorterStemmer().stem if use_stemmer else None

    def tokenize(self, text: str) -> list[str]:
        words = self._word.findall(text.lower())
        return [self._stem(word) if len(word) > 3 else word for word in words] if self._stem else words


@cache
def _rouge_scorer(types: tuple[str, ...], use_stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(types), tokenizer=_UnicodeWords(use_stemmer))


def rouge(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    types: Sequence[str] = ROUGE_TYPES,
    use_stemmer: bool = False,
) -> dict[str, list[float]]:
    """ROUGE F-measures in [0, 1], one list per type and one number per row; the best of several references counts.

    `rougeLsum` takes the lines of a text as its sentences. `use_stemmer` compares Porter stems.
    """
    rows = reference_lists(predictions, references)
    scorer = _rouge_scorer(tuple(types), use_stemmer)
    scores = [scorer.score_multi(row, text) for text, row in zip(predictions, rows, strict=True)]
    return {kind: [float(score[kind].fmeasure) for score in scores] for kind in types}


def bleu(predictions: Sequence[str], references: Sequence[Reference], *, tokenize: str = "13a") -> float:
    """Corpus BLEU, 0 to 100: n-gram counts are summed over rows before the precisions are taken.

    `tokenize` is a sacrebleu tokenizer: "13a" (the WMT default), "zh", "char", "flores200", "none", ...
    """
    from sacrebleu.metrics import BLEU

    rows = reference_lists(predictions, references)
    width = max(map(len, rows))
    streams: Any = [[row[i] if i < len(row) else None for row in rows] for i in range(width)]
    metric = BLEU(tokenize=tokenize)
    return float(metric.corpus_score(list(predictions), streams).score)


def sentence_bleu(predictions: Sequence[str], references: Sequence[Reference], *, tokenize: str = "13a") -> list[float]:
    """BLEU of each row, 0 to 100, with sacrebleu's exponential smoothing.

    Orders longer than the answer are left out (`effective_order`), so that a right one-word answer scores 100.
    """
    from sacrebleu.metrics import BLEU

    rows = reference_lists(predictions, references)
    metric = BLEU(tokenize=tokenize, effective_order=True)
    return [float(metric.sentence_score(text, row).score) for text, row in zip(predictions, rows, strict=True)]
