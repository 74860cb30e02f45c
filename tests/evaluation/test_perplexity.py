"""Perplexity: token by token, and the same at every batch size."""

from __future__ import annotations

import math

import pytest
import torch

from aligntune.evaluation.perplexity import TokenLoss, row_losses

ROWS = [
    {"input_ids": [1, *range(8, 8 + length)], "labels": [-100, *range(8, 8 + length)]}
    for length in (1, 9, 3, 5, 14, 2, 7)
]
ROWS.append({"input_ids": [1, 9, 10, 11, 12], "labels": [-100, -100, -100, 11, 12]})


def losses(model, rows, **options) -> list[TokenLoss]:
    return row_losses(model, rows.__getitem__, [len(row["input_ids"]) for row in rows], **options)


def test_sums_weigh_tokens_not_batches():
    total = TokenLoss(8.0, 2) + TokenLoss(2.0, 8)
    assert total.mean == 1.0  # the mean of the batch means would be 2.125
    assert math.isnan(TokenLoss().mean)
    assert TokenLoss(1e6, 1).perplexity == math.exp(700)


def by_hand(model, row) -> TokenLoss:
    """Token by token, from the whole logits."""
    with torch.no_grad():
        scores = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
    trained = [(at, label) for at, label in enumerate(row["labels"]) if label != -100]
    return TokenLoss(-sum(float(scores[at - 1, label]) for at, label in trained), len(trained))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_of_each_row(model, batch_size: int):
    unlabelled = {"input_ids": [1, 2], "labels": [-100, -100]}
    rows = [*ROWS[:4], unlabelled, {**unlabelled}, *ROWS[4:]]
    found = losses(model, rows, batch_size=batch_size)
    assert found[4] == found[5] == TokenLoss()
    for row, loss in zip(rows, found, strict=True):
        want = by_hand(model, row)
        assert (loss.tokens, loss.nll) == (want.tokens, pytest.approx(want.nll, rel=1e-5))
    assert losses(model, [unlabelled] * 2) == [TokenLoss()] * 2


def test_the_model_is_evaluated_without_gradients_and_left_as_found(model):
    model.train()
    seen = []
    hook = model.model.register_forward_pre_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    losses(model, ROWS[:1])
    hook.remove()
    assert seen == [(False, False)]
    assert model.training
