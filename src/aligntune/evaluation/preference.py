"""Does the model prefer what people prefer? Held-out pairs: rewards, and answers to their prompts.

Names follow TRL's DPO trainer, so that `metric_for_best_model` reads the same on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from aligntune.errors import ConfigError, DataError
from aligntune.evaluation.answers import EvaluationRow, Message, TextGenerator, choose
from aligntune.textmetrics import bleu, rouge

REWARD_METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def preference_metrics(chosen_rewards: Iterable[float], rejected_rewards: Iterable[float]) -> dict[str, float]:
    """Means over held-out pairs; rewards may be implicit (DPO) or a reward model's.

    `rewards/accuracies` is the share of pairs whose chosen answer has the higher reward (a tie is wrong, as in TRL),
    `rewards/margins` the mean difference. A reward that is not a number makes its means, and the accuracy, nan.
    """
    chosen, rejected = [float(x) for x in chosen_rewards], [float(x) for x in rejected_rewards]
    if len(chosen) != len(rejected) or not chosen:
        raise DataError(f"pairs need one reward on each side: {len(chosen)} chosen, {len(rejected)} rejected")
    margins = [left - right for left, right in zip(chosen, rejected, strict=True)]
    return {
        "rewards/accuracies": _mean([math.nan if math.isnan(margin) else float(margin > 0) for margin in margins]),
        "rewards/margins": _mean(margins),
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
    }


def answer_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-L (0 to 1), corpus BLEU (0 to 100), and how many words are written for each word of the references."""
    words = sum(len(text.split()) for text in references)
    return {
        "rougeL": _mean(rouge(predictions, references, types=("rougeL",))["rougeL"]),
        "bleu": bleu(predictions, references),
        "length_ratio": sum(len(text.split()) for text in predictions) / max(1, words),
    }


def shot_metrics(
    generator: TextGenerator,
    rows: Sequence[EvaluationRow],
    *,
    max_samples: int,
    max_new_tokens: int,
    few_shot: bool = False,
    examples_text: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """`zero_shot_*` or `few_shot_*`: greedy answers to the prompts, scored against the chosen answers.

    Few-shot puts `examples_text` in front of each prompt; without that text it is a `ConfigError`.
    """
    if few_shot and not (examples_text or "").strip():
        raise ConfigError("few-shot evaluation needs examples: set dpo_few_shot_examples_text, or 0 few-shot samples")
    chosen = [rows[at] for at in choose(len(rows), max_samples, seed)]
    prompts = [
        _with_examples(row.prompt, examples_text) if few_shot and examples_text else row.prompt for row in chosen
    ]
    predictions = generator.generate(prompts, max_new_tokens=max_new_tokens, tools=[row.tools for row in chosen])
    scores = answer_metrics(predictions, [row.reference for row in chosen])
    return {f"{'few' if few_shot else 'zero'}_shot_{name}": score for name, score in scores.items()}


def _with_examples(prompt: str | list[Message], text: str) -> str | list[Message]:
    """`text` in front of a raw prompt, or of the first user message."""
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    first = next((at for at, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise DataError("few-shot examples go in front of the first user message, and this prompt has none")
    merged = {**prompt[first], "content": f"{text}\n\n{prompt[first]['content']}"}
    return [*prompt[:first], merged, *prompt[first + 1 :]]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
