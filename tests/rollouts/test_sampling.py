"""The reshaping of a distribution, by hand and against transformers' processors."""

import math

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from aligntune.errors import ConfigError
from aligntune.rollouts.base import SamplingParams, check_prompts, cut_at_stop
from aligntune.rollouts.sampling import chosen_log_probs, draw, reshaped, tempered

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def kept(**settings):
    scores = reshaped(P.log(), SamplingParams(max_new_tokens=1, **settings))
    return scores.isfinite()[0].tolist()


def test_truncation_by_hand():
    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(top_p=0.81) == [True, True, True, False]
    assert kept(min_p=0.2) == [True, True, True, False]  # 0.15 >= 0.2 * 0.5
    assert kept(top_k=99) == [True] * 4


def test_scores_are_float32_whatever_the_logits():
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.bfloat16)
    params = SamplingParams(max_new_tokens=1, temperature=0.7)
    for scores in (tempered(logits, params), reshaped(logits, params)):
        torch.testing.assert_close(scores, logits.float() / 0.7)


def test_temperature_and_penalty_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.0]])
    params = SamplingParams(max_new_tokens=1, temperature=0.5, repetition_penalty=2.0)
    seen = torch.tensor([[True, True, False]])
    assert reshaped(logits, params, seen).tolist() == [[2.0, -4.0, 0.0]]
    assert tempered(logits, params).tolist() == [[4.0, -2.0, 0.0]]
    assert tempered(logits, SamplingParams(max_new_tokens=1, temperature=0)).tolist() == logits.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_same_as_transformers(seed):
    torch.manual_seed(seed)
    logits = torch.randn(4, 50) * 3
    ids = torch.randint(0, 50, (4, 7))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    params = SamplingParams(max_new_tokens=1, temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    want = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()) / 0.7
    for step in (TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)):
        want = step(ids, want)
    torch.testing.assert_close(reshaped(logits, params, seen), want)


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    scores = P.log().expand(40_000, -1).contiguous()
    counts = torch.bincount(draw(scores, SamplingParams(max_new_tokens=1)), minlength=4) / 40_000
    assert (counts - P[0]).abs().max() < 4 * math.sqrt(0.25 / 40_000)  # four standard deviations
    assert draw(P.log(), SamplingParams(max_new_tokens=1, temperature=0)).tolist() == [0]


def test_a_dropped_token_is_never_drawn():
    torch.manual_seed(0)
    params = SamplingParams(max_new_tokens=1, top_k=2)
    tokens = draw(reshaped(P.log(), params).expand(5_000, -1).contiguous(), params)
    assert set(tokens.tolist()) == {0, 1}


def test_of_scores_that_are_nan_a_token_of_the_vocabulary_is_drawn():
    tokens = draw(torch.full((3, 5), math.nan), SamplingParams(max_new_tokens=1))
    assert tokens.tolist() == [4, 4, 4]


def test_log_prob_of_the_choice():
    assert chosen_log_probs(P.log() + 7, torch.tensor([2])).item() == pytest.approx(math.log(0.15))


def test_generation_kwargs_are_lifted_into_fields():
    params = SamplingParams.build({"top_k": 5, "min_p": None, "no_repeat_ngram_size": 2}, max_new_tokens=3, top_p=0.9)
    assert (params.top_k, params.min_p, params.top_p) == (5, 0.0, 0.9)
    assert params.generation_kwargs == {"no_repeat_ngram_size": 2}


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_k": "5"}, {"top_p": 0}, {"min_p": 2}, {"max_new_tokens": 0}, {"num_generations": 0}],
)
def test_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingParams(**{"max_new_tokens": 1, **bad})


def test_cut_and_prompts():
    assert cut_at_stop([5, 2, 7, 2], (2, 9)) == (2, True)
    assert cut_at_stop([5, 7], (2,)) == (2, False)
    with pytest.raises(ConfigError, match="prompt 1 has no tokens"):
        check_prompts([[1], []])
