"""ROUGE and BLEU: numbers by hand, and the packages they rest on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.errors import DataError
from aligntune.textmetrics import bleu, rouge, sentence_bleu


def test_rouge_by_hand():
    # 2 of 3 predicted and 2 of 4 reference words match: F = 2 * (2/3 * 2/4) / (2/3 + 2/4) = 4/7; the longest common
    # subsequence is "the cat" too. One bigram of 2 and 3: F = 2 * (1/2 * 1/3) / (1/2 + 1/3) = 0.4.
    scores = rouge(["The cat sat."], ["the cat ran fast"])
    assert scores["rouge1"] == [pytest.approx(4 / 7)]
    assert scores["rouge2"] == [pytest.approx(0.4)]
    assert scores["rougeL"] == [pytest.approx(4 / 7)]


def test_rouge_l_needs_order_and_rouge_1_does_not():
    scores = rouge(["b a"], ["a b"])
    assert scores["rouge1"] == [1.0]
    assert scores["rougeL"] == [0.5]


def test_rouge_lsum_unites_lines():
    # Line by line every word is found again; the longest common subsequence of the whole texts is one line.
    scores = rouge(["c d\na b"], ["a b\nc d"])
    assert scores["rougeLsum"] == [1.0]
    assert scores["rougeL"] == [0.5]


def test_rouge_stems_on_request():
    assert rouge(["cats jumped"], ["cat jumping"])["rouge1"] == [0.0]
    # "cats" is longer than three letters and becomes "cat"; both verbs become "jump".
    assert rouge(["cats jumped"], ["cat jumping"], use_stemmer=True)["rouge1"] == [1.0]


def test_rouge_takes_the_best_reference():
    assert rouge(["a b"], [["x y", "a b"]])["rouge1"] == [1.0]


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ("我爱猫", "我爱狗", 2 / 3),  # each character is a word
        ("Привет мир", "привет всем", 1 / 2),
        ("हिन्दी भाषा", "हिन्दी", 2 / 3),  # vowel signs belong to their word
        ("snake_case", "snake case", 1.0),  # '_' separates, as in rouge-score
    ],
)
def test_rouge_reads_every_script(prediction: str, reference: str, f1: float):
    assert rouge([prediction], [reference])["rouge1"] == [pytest.approx(f1)]


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)), st.booleans())
def test_rouge_is_rouge_score_on_ascii(prediction: str, reference: str, use_stemmer: bool):
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    expected = RougeScorer(kinds, use_stemmer=use_stemmer).score(reference, prediction)
    found = rouge([prediction], [reference], use_stemmer=use_stemmer)
    assert {kind: found[kind][0] for kind in kinds} == {kind: expected[kind].fmeasure for kind in kinds}


def test_bleu_by_hand():
    # 6 words against 6, no brevity penalty; precisions 5/6, 3/5, 2/4, 1/3; their product is 1/12.
    score = bleu(["the cat is on the mat"], ["the cat is on a mat"])
    assert score == pytest.approx(100 * (1 / 12) ** 0.25)


def test_bleu_brevity_penalty_by_hand():
    # All n-grams match; 4 words against 5: exp(1 - 5/4).
    assert bleu(["a b c d"], ["a b c d e"]) == pytest.approx(100 * 2.718281828459045**-0.25)


def test_corpus_bleu_sums_counts_and_is_not_a_mean():
    predictions, references = ["a b c d", "x y z w q"], ["a b c d", "x y z v q"]
    # Sums over both rows: 1-grams 8/9, 2-grams 5/7, 3-grams 3/5, 4-grams 1/3.
    expected = 100 * (8 / 9 * 5 / 7 * 3 / 5 * 1 / 3) ** 0.25
    assert bleu(predictions, references) == pytest.approx(expected)
    assert sum(sentence_bleu(predictions, references)) / 2 != pytest.approx(expected)


def test_bleu_with_different_numbers_of_references():
    assert bleu(["a b c d", "e f g h"], [["x", "a b c d"], "e f g h"]) == pytest.approx(100)


def test_sentence_bleu_of_a_right_word_is_full():
    assert sentence_bleu(["Paris", ""], ["Paris", "Paris"]) == [pytest.approx(100), 0.0]


def test_bleu_tokenizer_is_chosen():
    assert bleu(["我爱北京天安门"], ["我爱北京天安门城"], tokenize="zh") > 80
    assert bleu(["我爱北京天安门"], ["我爱北京天安门城"]) == 0  # one unknown word under the WMT tokenizer


@pytest.mark.parametrize("metric", [rouge, bleu, sentence_bleu])
def test_bad_rows_are_named(metric):
    with pytest.raises(DataError, match="2 predictions but 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(DataError, match="no predictions"):
        metric([], [])
    with pytest.raises(DataError, match="row 1 has no reference"):
        metric(["a", "b"], ["a", []])
