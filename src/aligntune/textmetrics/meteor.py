"""How well do the words of two texts align? METEOR, by exact words, word stems and, where WordNet is, synonyms.

Banerjee and Lavie 2005 ("METEOR: An Automatic Metric for MT Evaluation", METEOR 1.0) in the form of Lavie and Agarwal
2007, with the parameters that NLTK uses too (alpha 0.9, beta 3, gamma 0.5):

    score = (1 - gamma * (chunks / matches) ** beta) * P * R / (alpha * P + (1 - alpha) * R)

P and R are the matched share of the prediction's and the reference's words. Words align in stages (exact, stem,
synonym), each with as many matches as possible and, among those, the fewest crossing pairs, then the fewest chunks.
NLTK pairs repeated words from the end backwards, which may cross more: with many repeated words it scores lower (by 0.03
on average on 300 shuffled Alpaca answers, and never differs in P and R).
Deviations: crossings are minimised by coordinate descent (exact for one repeated word, near-exact for several); the
synonym stage is greedy from left to right.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache

from aligntune.textmetrics.rows import Reference, reference_lists

Synonyms = Callable[[str], set[str]]
Pairs = dict[int, int]
"""Word position in the prediction -> word position in the reference."""

_WORD_OR_MARK = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def meteor(
    predictions: Sequence[str],
    references: Sequence[Reference],
    *,
    alpha: float = 0.9,
    beta: float = 3.0,
    gamma: float = 0.5,
    tokenize: Callable[[str], list[str]] | None = None,
    synonyms: Synonyms | str | None = "wordnet",
) -> list[float]:
    """METEOR of each row, in [0, 1]; the best of several references counts.

    `tokenize` splits a text into words (default: lower-cased words and punctuation marks). `synonyms` maps a word to
    its synonyms; "wordnet" uses NLTK's WordNet where its data is installed and else only words and stems.
    """
    rows = reference_lists(predictions, references)
    split = tokenize or _words
    lookup = wordnet_synonyms() if synonyms == "wordnet" else synonyms

    def score(prediction: str, reference: str) -> float:
        left, right = split(prediction), split(reference)
        pairs = align(left, right, lookup)  # type: ignore[arg-type]
        if not pairs:
            return 0.0
        precision, recall = len(pairs) / len(left), len(pairs) / len(right)
        penalty = gamma * (count_chunks(pairs) / len(pairs)) ** beta
        return (1 - penalty) * precision * recall / (alpha * precision + (1 - alpha) * recall)

    return [max(score(text, row) for row in alternatives) for text, alternatives in zip(predictions, rows, strict=True)]


def _words(text: str) -> list[str]:
    return _WORD_OR_MARK.findall(text.lower())


@cache
def _stem() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    return cache(PorterStemmer().stem)


@cache
def wordnet_synonyms() -> Synonyms | None:
    """The one-word lemmas that share a synset with a word, or None if NLTK or its WordNet data is not installed."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:  # NLTK's own signal for data that was never downloaded
        return None

    @cache
    def synonyms(word: str) -> set[str]:
        return {name for synset in wordnet.synsets(word) for name in synset.lemma_names() if "_" not in name}

    return synonyms


def count_chunks(pairs: Pairs) -> int:
    """Runs of matched words that are adjacent and in the same order in both texts."""
    return sum(1 for left, right in pairs.items() if pairs.get(left - 1) != right - 1)


def align(prediction: Sequence[str], reference: Sequence[str], synonyms: Synonyms | None = None) -> Pairs:
    """The METEOR alignment of two lists of lower-cased words."""
    stem = _stem()
    pairs: Pairs = {}
    _match_equal(pairs, prediction, reference)
    _match_equal(pairs, [stem(word) for word in prediction], [stem(word) for word in reference])
    if synonyms is not None:
        _match_synonyms(pairs, prediction, reference, synonyms)
    return dict(sorted(pairs.items()))


def _match_equal(pairs: Pairs, left: Sequence[str], right: Sequence[str]) -> None:
    """Pair all equal words that are still free, as many as there are, crossing as little as possible."""
    groups: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    taken = set(pairs.values())
    for i, word in enumerate(left):
        if i not in pairs:
            groups[word][0].append(i)
    for j, word in enumerate(right):
        if j not in taken:
            groups[word][1].append(j)
    matchable = [group for group in groups.values() if group[0] and group[1]]
    # Pairs of one word never cross in a best alignment, so equal counts leave nothing to choose.
    unequal = []
    for lefts, rights in matchable:
        if len(lefts) == len(rights):
            pairs.update(zip(lefts, rights, strict=True))
        else:
            unequal.append((lefts, rights))
    unequal.sort(key=lambda group: abs(len(group[0]) - len(group[1])))
    _settle(pairs, unequal, len(left) + len(right))


def _settle(pairs: Pairs, groups: list[tuple[list[int], list[int]]], length: int, max_sweeps: int = 10) -> None:
    """Choose which occurrences of each over-supplied word are paired: one word at a time, the others held fixed."""
    for _ in range(max_sweeps):
        before = dict(pairs)
        for lefts, rights in groups:
            for i in lefts:
                pairs.pop(i, None)
            pairs.update(_best_pairing(lefts, rights, pairs, length))
        if pairs == before:
            return


def _best_pairing(lefts: list[int], rights: list[int], fixed: Pairs, length: int) -> Pairs:
    """The in-order pairing of all of the shorter list with the least (crossings with `fixed`, chunks)."""
    if len(lefts) > len(rights):
        flipped = _best_pairing(rights, lefts, {j: i for i, j in fixed.items()}, length)
        return {i: j for j, i in flipped.items()}
    crossings = _crossings(lefts, rights, fixed)
    surplus = len(rights) - len(lefts)
    # best[s]: least cost of pairing the words so far while skipping s positions of `rights`; came[n][s]: how many of these
    # were skipped before word n. Of equal costs the fewest skipped early counts.
    best, came = [0] * (surplus + 1), []
    for n, i in enumerate(lefts):
        follows = n > 0 and lefts[n - 1] == i - 1
        step, source, least = [], [], 0
        for skipped in range(surplus + 1):
            j = rights[n + skipped]
            if best[skipped] < best[least]:
                least = skipped
            # A pair beside the one before it saves a chunk, which only the same skips can give.
            beside = follows and rights[n + skipped - 1] == j - 1
            taken = skipped if best[skipped] - beside < best[least] else least
            adjacent = (fixed.get(i - 1) == j - 1) + (fixed.get(i + 1) == j + 1) + (beside and taken == skipped)
            step.append(best[taken] + crossings[n][n + skipped] * (length + 1) - adjacent)
            source.append(taken)
        best = step
        came.append(source)
    skipped, chosen = best.index(min(best)), {}
    for n in range(len(lefts) - 1, -1, -1):
        chosen[lefts[n]] = rights[n + skipped]
        skipped = came[n][skipped]
    return dict(reversed(chosen.items()))


def _crossings(lefts: list[int], rights: list[int], fixed: Pairs) -> list[list[int]]:
    """[len(lefts), len(rights)] number of `fixed` pairs that a pair (i, j) would cross."""
    order = sorted(fixed.items())
    table = []
    before: list[int] = []
    after = sorted(fixed.values())
    at = 0
    for i in lefts:
        while at < len(order) and order[at][0] < i:
            insort(before, order[at][1])
            del after[bisect_left(after, order[at][1])]
            at += 1
        table.append([len(before) - bisect_left(before, j) + bisect_left(after, j) for j in rights])
    return table


def _match_synonyms(pairs: Pairs, left: Sequence[str], right: Sequence[str], synonyms: Synonyms) -> None:
    """Pair free words with a free synonym, left to right, crossing as little as possible."""
    free: dict[str, list[int]] = defaultdict(list)
    taken = set(pairs.values())
    for j, word in enumerate(right):
        if j not in taken:
            free[word].append(j)
    for i, word in enumerate(left):
        if i in pairs:
            continue
        options = sorted(j for synonym in synonyms(word) for j in free.get(synonym, ()))
        if options:
            cost = _crossings([i], options, pairs)[0]
            j = min(zip(cost, options, strict=True))[1]
            pairs[i] = j
            free[right[j]].remove(j)
