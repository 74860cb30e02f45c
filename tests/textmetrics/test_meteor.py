"""METEOR: published worked examples, numbers by hand, and brute force over alignments."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.textmetrics import meteor
from aligntune.textmetrics.meteor import Pairs, align, count_chunks, wordnet_synonyms

MAT = "the cat sat on the mat"


@pytest.mark.parametrize(
    ("prediction", "score"),
    [  # the examples of the METEOR article on Wikipedia: fragmentation 6/6, 1/6 and 2/6
        ("on the mat sat the cat", 0.5),
        ("the cat sat on the mat", 1 - 0.5 * (1 / 6) ** 3),
        ("the cat was sat on the mat", (1 - 0.5 * (2 / 6) ** 3) * 10 * (6 / 7) / (1 + 9 * 6 / 7)),
    ],
)
def test_published_examples(prediction: str, score: float):
    assert meteor([prediction], [MAT], synonyms=None) == [pytest.approx(score)]


def test_published_example_of_chunks():
    # Banerjee and Lavie 2005, section 2.2: "the president" and "spoke to the audience" are two chunks.
    pairs = align(
        ["the", "president", "spoke", "to", "the", "audience"],
        ["the", "president", "then", "spoke", "to", "the", "audience"],
    )
    assert (len(pairs), count_chunks(pairs)) == (6, 2)


def test_crossing_free_alignment_beats_the_last_occurrence():
    # NLTK's documentation gives 0.6944 here, by pairing the last "the", which crosses. Without crossings 12 words
    # match in 4 chunks: P = 12/18, R = 12/16, F = 0.9-weighted harmonic mean, penalty 0.5 / 27.
    prediction = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    mean = (12 / 18) * (12 / 16) / (0.9 * 12 / 18 + 0.1 * 12 / 16)
    assert meteor([prediction], [reference], synonyms=None) == [pytest.approx(mean * (1 - 0.5 * (4 / 12) ** 3))]


def test_stems_match_after_words():
    assert meteor(["cats running"], ["cat runs"], synonyms=None) == [pytest.approx(1 - 0.5 / 8)]
    assert align(["run", "running"], ["running", "run"]) == {0: 1, 1: 0}  # exact words first, though they cross


def test_synonyms_match_last():
    synonyms = {"car": {"automobile"}}
    found = meteor(["red car"], ["red automobile"], synonyms=lambda word: synonyms.get(word, set()))
    assert found == [pytest.approx(1 - 0.5 / 8)]
    assert meteor(["red car"], ["red automobile"], synonyms=None) == [pytest.approx(0.5 * 0.5)]


def test_wordnet_is_used_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    import nltk.corpus

    class Synset:
        def lemma_names(self):
            return ["automobile", "motor_car"]

    class WordNet:
        installed = True

        def ensure_loaded(self):
            if not self.installed:
                raise LookupError("Resource wordnet not found")

        def synsets(self, word: str):
            return [Synset()] if word == "car" else []

    monkeypatch.setattr(nltk.corpus, "wordnet", WordNet())
    lookup = wordnet_synonyms.__wrapped__()
    assert lookup("car") == {"automobile"}
    monkeypatch.setattr(WordNet, "installed", False)
    assert wordnet_synonyms.__wrapped__() is None


def test_parameters_act():
    base = meteor(["the cat"], [MAT], synonyms=None)
    assert meteor(["the cat"], [MAT], synonyms=None, alpha=0.5) > base  # precision 1 counts more
    assert meteor(["the cat"], [MAT], synonyms=None, gamma=0.0) == [pytest.approx((1 / 3) / (0.9 + 0.1 / 3))]
    assert meteor(["the cat"], [MAT], synonyms=None, beta=1.0) < base
    assert meteor(["the-cat"], ["the cat"], synonyms=None, tokenize=str.split) == [0.0]


def test_no_match_and_empty_text_score_nothing():
    assert meteor(["dog", "", "dog"], ["cat", "cat", ["cat", "Dog"]], synonyms=None) == [0.0, 0.0, 0.5]


def crossings(pairs: Pairs) -> int:
    return sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(pairs.items(), 2))


def alignments(left: list[str], right: list[str], at: int = 0) -> list[Pairs]:
    if at == len(left):
        return [{}]
    rest = alignments(left, right, at + 1)
    taken = [
        {at: j, **pairs}
        for j, word in enumerate(right)
        if word == left[at]
        for pairs in rest
        if j not in pairs.values()
    ]
    return rest + taken


letters = st.lists(st.sampled_from("abc"), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(letters, letters)
def test_alignment_against_all_alignments(left: list[str], right: list[str]):
    found = align(left, right)
    every = alignments(left, right)
    most = max(map(len, every))
    assert len(found) == most
    assert all(left[i] == right[j] for i, j in found.items())
    assert len(set(found.values())) == most
    fewest = min(crossings(pairs) for pairs in every if len(pairs) == most)
    assert crossings(found) <= fewest + 1  # coordinate descent: rarely one more than the optimum


@settings(deadline=None, max_examples=50)
@given(st.permutations("abcdefg"), st.permutations("cdefghi"))
def test_equals_nltk_where_no_word_repeats(left: list[str], right: list[str]):
    nltk = pytest.importorskip("nltk.translate.meteor_score")

    class NoWordNet:
        def synsets(self, _: str):
            return []

    expected = nltk.single_meteor_score(right, left, wordnet=NoWordNet())
    assert meteor([" ".join(left)], [" ".join(right)], synonyms=None) == [pytest.approx(expected, abs=1e-12)]


def test_an_answer_that_repeats_one_word_is_scored_as_any_other():
    # 2,000 times "the" against 200: this took a step for each choice of each two of them, several minutes in all
    (score,) = meteor(["the " * 2000], ["the cat " * 200], synonyms=None)
    mean = 0.1 * 0.5 / (0.9 * 0.1 + 0.1 * 0.5)  # P = 200/2000, R = 200/400; each of the 200 matches is a chunk
    assert score == pytest.approx(mean * 0.5)
