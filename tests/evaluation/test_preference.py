"""Held-out pairs: reward statistics by hand, zero- and few-shot answers."""

from __future__ import annotations

import math

import pytest

from aligntune.errors import ConfigError, DataError
from aligntune.evaluation.answers import EvaluationRow
from aligntune.evaluation.preference import (
    REWARD_METRICS,
    answer_metrics,
    preference_metrics,
    shot_metrics,
)


def test_rewards_by_hand():
    metrics = preference_metrics([1.0, 2.0, 0.0, 3.0], [0.0, 2.0, 1.0, 0.0])
    assert metrics == {
        "rewards/accuracies": 0.5,  # the tie is wrong
        "rewards/margins": 0.75,
        "rewards/chosen": 1.5,
        "rewards/rejected": 0.75,
    }
    assert tuple(metrics) == REWARD_METRICS


def test_a_diverged_model_is_not_a_bad_one():
    metrics = preference_metrics([math.nan, 1.0], [0.0, 0.0])
    assert math.isnan(metrics["rewards/accuracies"])
    assert metrics["rewards/rejected"] == 0.0


def test_tensors_are_numbers():
    torch = pytest.importorskip("torch")
    assert preference_metrics(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))["rewards/accuracies"] == 0.5


def test_sides_must_match():
    with pytest.raises(DataError, match="2 chosen, 1 rejected"):
        preference_metrics([1.0, 2.0], [1.0])


def test_answers_by_hand():
    metrics = answer_metrics(["a b c d", "x"], ["a b c d", "x y z"])
    # ROUGE-L: 1, and 2 * (1 * 1/3) / (1 + 1/3) = 1/2. 5 words for 7. BLEU: all n-grams right, exp(1 - 7/5).
    assert metrics["rougeL"] == pytest.approx(0.75)
    assert metrics["length_ratio"] == pytest.approx(5 / 7)
    assert metrics["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 5))


class Recorder:
    def __init__(self) -> None:
        self.prompts: list[object] = []

    def generate(self, prompts, *, max_new_tokens, tools=None):
        self.prompts = list(prompts)
        return ["yes"] * len(prompts)


ROWS = [
    EvaluationRow("Is it?", "yes"),
    EvaluationRow([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}], "yes"),
]


def test_zero_and_few_shot():
    generator = Recorder()
    zero = shot_metrics(generator, ROWS, max_samples=5, max_new_tokens=3)
    assert set(zero) == {"zero_shot_rougeL", "zero_shot_bleu", "zero_shot_length_ratio"}
    assert zero["zero_shot_rougeL"] == 1.0
    assert generator.prompts == [row.prompt for row in ROWS]
    few = shot_metrics(generator, ROWS, max_samples=5, max_new_tokens=3, few_shot=True, examples_text="Was it? No.")
    assert few["few_shot_length_ratio"] == 1.0
    assert generator.prompts == [
        "Was it? No.\n\nIs it?",
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was it? No.\n\nIs it?"}],
    ]
    assert ROWS[1].prompt[1]["content"] == "Is it?"
    shot_metrics(generator, ROWS * 10, max_samples=3, max_new_tokens=3)
    assert len(generator.prompts) == 3


@pytest.mark.parametrize("text", [None, " "])
def test_few_shot_without_examples_is_an_error(text: str | None):
    with pytest.raises(ConfigError, match="dpo_few_shot_examples_text"):
        shot_metrics(Recorder(), ROWS, max_samples=1, max_new_tokens=3, few_shot=True, examples_text=text)
