"""Perplexity: by hand, and the same at every batch size and packed."""

from __future__ import annotations

import math

import pytest
import torch

from aligntune.errors import DataError
from aligntune.evaluation.perplexity import TokenLoss, evaluate_loss, row_losses, token_loss

ROWS = [
    {"input_ids": [1, *range(8, 8 + length)], "labels": [-100, *range(8, 8 + length)]}
    for length in (1, 9, 3, 5, 14, 2, 7)
]
ROWS.append({"input_ids": [1, 9, 10, 11, 12], "labels": [-100, -100, -100, 11, 12]})


def test_token_loss_by_hand():
    # Two classes with logits (0, log 3): probabilities 1/4 and 3/4. The tokens 1, 0 and 1 are predicted; the second is
    # not counted. The last position predicts nothing.
    logits = torch.tensor([0.0, math.log(3)]).expand(1, 4, 2)
    loss = token_loss(logits, torch.tensor([[0, 1, -100, 1]]))
    assert loss.tokens == 2
    assert loss.nll == pytest.approx(-2 * math.log(3 / 4))
    assert loss.perplexity == pytest.approx(4 / 3)


def test_sums_weigh_tokens_not_batches():
    total = TokenLoss(8.0, 2) + TokenLoss(2.0, 8)
    assert total.mean == 1.0  # the mean of the batch means would be 2.125
    assert math.isnan(TokenLoss().mean)
    assert TokenLoss(1e6, 1).perplexity == math.exp(700)


@pytest.mark.parametrize(("batch_size", "packed"), [(1, False), (3, False), (8, False), (3, True), (8, True)])
def test_perplexity_does_not_depend_on_batches(model, batch_size: int, packed: bool):
    nll, tokens = 0.0, 0
    with torch.no_grad():  # row by row, token by token
        for row in ROWS:
            scores = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            for at, label in enumerate(row["labels"]):
                if label != -100:
                    nll -= float(scores[at - 1, label])
                    tokens += 1
    loss = evaluate_loss(model, ROWS, batch_size=batch_size, packed=packed)
    assert loss.tokens == tokens
    assert loss.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_chunks_do_not_change_the_sum(model, monkeypatch: pytest.MonkeyPatch):
    whole = evaluate_loss(model, ROWS)
    monkeypatch.setattr("aligntune.evaluation.perplexity._CHUNK", 3)
    assert evaluate_loss(model, ROWS).nll == pytest.approx(whole.nll)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_each_row(model, batch_size: int):
    unlabelled = {"input_ids": [1, 2], "labels": [-100, -100]}
    rows = [*ROWS[:4], unlabelled, {**unlabelled}, *ROWS[4:]]
    found = row_losses(model, rows, batch_size=batch_size)
    assert found[4] == found[5] == TokenLoss()
    for row, loss in zip(ROWS, [*found[:4], *found[6:]], strict=True):
        alone = evaluate_loss(model, [row])
        assert (loss.tokens, loss.nll) == (alone.tokens, pytest.approx(alone.nll, rel=1e-5))
    assert row_losses(model, [unlabelled] * 2) == [TokenLoss()] * 2


@pytest.mark.parametrize("measure", [evaluate_loss, row_losses])
def test_the_model_is_evaluated_without_gradients_and_left_as_found(model, measure):
    model.train()
    seen = []
    hook = model.model.register_forward_pre_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    measure(model, ROWS[:1])
    hook.remove()
    assert seen == [(False, False)]
    assert model.training


def test_nothing_to_measure_is_an_error(model):
    with pytest.raises(DataError, match="no rows"):
        evaluate_loss(model, [])
    with pytest.raises(DataError, match="no token of the evaluation rows has a label"):
        evaluate_loss(model, [{"input_ids": [1, 2], "labels": [-100, -100]}])
