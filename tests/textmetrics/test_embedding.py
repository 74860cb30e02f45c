"""BERTScore and semantic similarity: matching by hand, invariances, and the reference implementation."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aligntune.errors import ConfigError, DataError, ModelError
from aligntune.textmetrics import bertscore, load_encoder, random_pair_baseline, semantic_similarity
from aligntune.textmetrics.embedding import Encoder, greedy_match

TEXTS = ["the cat sat on the mat", "a dog ran", "the red bird was happy and then sad", "it ran", "a cat"]
OTHERS = ["a cat sat on the rug", "the dog sat slowly", "blue bird", "it was happy", "a cat"]


def side(vectors: list[list[float]], weights: list[float]) -> SimpleNamespace:
    unit = torch.nn.functional.normalize(torch.tensor(vectors, dtype=torch.float32), dim=-1)
    return SimpleNamespace(vectors=unit, weights=torch.tensor(weights, dtype=torch.float32))


def test_greedy_matching_by_hand():
    # Prediction: east and north-east; reference: east and north. Cosines: [[1, 0], [h, h]] with h = 1/sqrt(2).
    h = 1 / math.sqrt(2)
    precision, recall, f1 = greedy_match(side([[1, 0], [1, 1]], [1, 1]), side([[2, 0], [0, 3]], [1, 1]))
    assert precision == pytest.approx((1 + h) / 2)
    assert recall == pytest.approx((1 + h) / 2)
    assert f1 == pytest.approx((1 + h) / 2)
    # Weights 3 and 1 on the prediction's words: (3 * 1 + 1 * h) / 4.
    precision, recall, _ = greedy_match(side([[1, 0], [1, 1]], [3, 1]), side([[2, 0], [0, 3]], [1, 1]))
    assert precision == pytest.approx((3 + h) / 4)
    assert recall == pytest.approx((1 + h) / 2)


def test_greedy_matching_of_nothing_is_zero():
    assert greedy_match(side([[1, 0]], [0]), side([[1, 0]], [1])) == (0.0, 0.0, 0.0)


def test_a_text_equals_itself(encoder: Encoder):
    scores = bertscore(TEXTS, TEXTS, encoder)
    assert scores["f1"] == pytest.approx([1.0] * 5, abs=1e-6)
    assert semantic_similarity(TEXTS, TEXTS, encoder) == pytest.approx([1.0] * 5, abs=1e-6)


def test_precision_and_recall_swap_with_the_sides(encoder: Encoder):
    forth, back = bertscore(TEXTS, OTHERS, encoder), bertscore(OTHERS, TEXTS, encoder)
    assert forth["precision"] == pytest.approx(back["recall"])
    assert forth["precision"] != pytest.approx(forth["recall"], abs=1e-4)


def test_scores_do_not_depend_on_the_batch(encoder: Encoder):
    together = bertscore(TEXTS, OTHERS, encoder)
    alone = [bertscore([left], [right], encoder)["f1"][0] for left, right in zip(TEXTS, OTHERS, strict=True)]
    assert together["f1"] == pytest.approx(alone, abs=1e-6)
    alone = [semantic_similarity([left], [right], encoder)[0] for left, right in zip(TEXTS, OTHERS, strict=True)]
    assert semantic_similarity(TEXTS, OTHERS, encoder) == pytest.approx(alone, abs=1e-6)


def test_special_tokens_weigh_nothing_and_unknown_words_do(encoder: Encoder):
    assert bertscore([""], ["the cat"], encoder) == {"precision": [0.0], "recall": [0.0], "f1": [0.0]}
    assert bertscore(["zebra"], ["zebra"], encoder)["f1"] == [pytest.approx(1.0)]


def test_idf_by_hand(encoder: Encoder):
    # References: "a cat", "a dog". "a" is in both: log(3/3) = 0; "cat" in one: log(3/2), so only "cat" counts.
    scores = bertscore(["a cat", "a dog"], ["a cat", "a dog"], encoder, idf=True)
    assert scores["f1"] == pytest.approx([1.0, 1.0])
    ids = encoder.token_ids(["a dog", "a cat"])
    dog, cat = (torch.nn.functional.normalize(states, dim=-1) for states in encoder.vectors(ids, 3))
    expected = float((cat @ dog.T)[2].max())  # [CLS] a cat [SEP]: the recall of "cat" alone
    assert bertscore(["a dog", "a dog"], ["a cat", "a dog"], encoder, idf=True)["recall"][0] == pytest.approx(expected)


def test_layer_is_chosen(encoder: Encoder):
    assert encoder.default_layer() == 3  # three quarters of 4
    assert Encoder(encoder.model, encoder.tokenizer, "org/roberta-large").default_layer() == 4  # 17, capped
    assert bertscore(TEXTS, OTHERS, encoder)["f1"] == bertscore(TEXTS, OTHERS, encoder, layer=3)["f1"]
    assert bertscore(TEXTS, OTHERS, encoder, layer=1)["f1"] != bertscore(TEXTS, OTHERS, encoder, layer=3)["f1"]
    # Layer 0 is the embeddings, layer 4 what the model returns.
    ids = encoder.token_ids(["a cat"])
    with torch.no_grad():
        whole = encoder.model(torch.tensor(ids)).last_hidden_state[0]
    assert torch.allclose(encoder.vectors(ids, 4)[0], whole, atol=1e-6)
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        bertscore(TEXTS, OTHERS, encoder, layer=5)


def test_baseline_rescales(encoder: Encoder):
    raw = bertscore(TEXTS, OTHERS, encoder)
    scaled = bertscore(TEXTS, OTHERS, encoder, baseline=(0.2, 0.4, 0.5))
    assert scaled["precision"] == pytest.approx([(x - 0.2) / 0.8 for x in raw["precision"]])
    assert scaled["recall"] == pytest.approx([(x - 0.4) / 0.6 for x in raw["recall"]])
    assert scaled["f1"] == pytest.approx([(x - 0.5) / 0.5 for x in raw["f1"]])


def test_random_pairs_give_a_baseline(encoder: Encoder):
    # Of two texts there is one unlike pair, in two orders; F1 is the same in both.
    expected = bertscore(["a cat"], ["the dog"], encoder)["f1"][0]
    baseline = random_pair_baseline(["a cat", "the dog", "a cat"], encoder, pairs=20)
    assert baseline[2] == pytest.approx(expected)
    assert random_pair_baseline(TEXTS, encoder, pairs=9, seed=1) == random_pair_baseline(
        TEXTS, encoder, pairs=9, seed=1
    )
    with pytest.raises(DataError, match="two different texts"):
        random_pair_baseline(["a cat", "a cat"], encoder)


def test_the_best_reference_counts(encoder: Encoder):
    assert bertscore(["a cat"], [["blue bird", "a cat"]], encoder)["f1"] == [pytest.approx(1.0)]
    assert semantic_similarity(["a cat"], [["blue bird", "a cat"]], encoder) == [pytest.approx(1.0)]


def test_similarity_by_hand(encoder: Encoder):
    @torch.no_grad()
    def mean(text: str) -> torch.Tensor:
        return encoder.model(torch.tensor(encoder.token_ids([text]))).last_hidden_state[0].mean(dim=0)

    expected = torch.nn.functional.cosine_similarity(mean("a cat"), mean("the dog ran"), dim=0)
    assert semantic_similarity(["a cat"], ["the dog ran"], encoder) == [pytest.approx(float(expected), abs=1e-6)]


def test_long_texts_are_cut_to_what_the_model_takes(encoder: Encoder):
    assert [len(ids) for ids in encoder.token_ids(["cat " * 50])] == [16]
    assert bertscore(["cat " * 50], ["cat " * 60], encoder)["f1"] == [pytest.approx(1.0)]


def test_a_missing_encoder_is_an_error_with_advice(tmp_path: Path):
    with pytest.raises(ModelError, match="give the path of a folder"):
        load_encoder(str(tmp_path))


def test_equals_bert_score(encoder: Encoder, encoder_folder: Path):
    reference = pytest.importorskip("bert_score")
    for idf in (False, True):
        # batch_size 1: bert_score lets padding count as similarity 0.
        expected = reference.score(
            TEXTS, OTHERS, model_type=str(encoder_folder), num_layers=2, idf=idf, nthreads=0, device="cpu", batch_size=1
        )
        found = bertscore(TEXTS, OTHERS, encoder, layer=2, idf=idf)
        for name, scores in zip(("precision", "recall", "f1"), expected, strict=True):
            assert found[name] == pytest.approx(scores.tolist(), abs=1e-6)
