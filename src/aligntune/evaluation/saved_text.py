"""How good is a saved language model on rows with text, answers or preference pairs, and a reward model on pairs?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from aligntune.config import rl, sft
from aligntune.config.run import SFTRunConfig
from aligntune.data import row_reader, tokenize_pairs, tokenize_sft
from aligntune.data.examples import PairExample
from aligntune.data.masks import IGNORED
from aligntune.data.sources import list_lengths
from aligntune.evaluation.answers import EvaluationRow, GreedyGenerator, evaluation_row
from aligntune.evaluation.evaluator import AnswerEvaluator
from aligntune.evaluation.perplexity import TokenLoss, row_losses
from aligntune.evaluation.preference import preference_metrics
from aligntune.evaluation.registry import REGISTRY, metrics_from_config
from aligntune.evaluation.saved_base import PREFERENCE, SavedEvaluation, batch_size, check_names, load_for_evaluation
from aligntune.models.files import adapter_base
from aligntune.models.heads import longest_input, saved_head
from aligntune.models.precision import device

ROW = "_row"
"""Column that carries a row's number through tokenising, which may drop rows."""


def chosen_metrics(config: sft.EvaluationConfig, names: Sequence[Any] | None) -> sft.EvaluationConfig:
    """`config` with exactly the metrics `names`; None leaves it as it is. Raises `ConfigError` for an unknown one."""
    from aligntune.evaluation import text_metrics  # noqa: F401  (fills the registry)

    if names is None:
        return config
    switches = {"perplexity": "compute_perplexity"} | {name: entry.setting for name, entry in REGISTRY.items()}
    functions = [name for name in names if not isinstance(name, str) or ":" in name]
    plain = [name for name in names if name not in functions]
    check_names(plain, list(switches))
    given = {name: getattr(config, name) for name in config.model_fields_set}
    asked = {setting: name in plain for name, setting in switches.items()}
    return sft.EvaluationConfig(**(given | asked | {"custom_metrics": functions or None}))


def evaluate_answers(run: SFTRunConfig, rows: Any, wanted: sft.EvaluationConfig, task: str) -> SavedEvaluation:
    """Perplexity of every row, and greedy answers to those that have an answer, with their metrics."""
    source = run.sources[0]
    questions = _questions(rows, source)
    metrics = metrics_from_config(wanted, has_references=bool(questions))
    model, tokenizer = load_for_evaluation(run)
    found: dict[str, float] = {}
    records: dict[int, dict[str, Any]] = {}
    if wanted.compute_perplexity:
        found, records = _losses(run, rows, model, tokenizer)
    if metrics:
        numbers = [number for number, _ in questions]
        limit = wanted.max_samples_for_quality_metrics if wanted.is_set("max_samples_for_quality_metrics") else None
        asked = run.train.per_device_batch_size if run.train.is_set("per_device_batch_size") else None
        evaluator = AnswerEvaluator(
            GreedyGenerator.of(model, tokenizer, batch_size=asked, seed=run.train.seed),
            [question for _, question in questions],
            metrics, wanted.max_new_tokens, limit, run.train.seed, str(device()),
        )  # fmt: skip
        evaluator.check()
        answered = evaluator.evaluate()
        found |= answered.metrics
        for record in answered.predictions:
            number = numbers[record["row"]]
            records[number] = record | records.get(number, {}) | {"row": number}
    return SavedEvaluation(found, [records[number] for number in sorted(records)], task)


def _questions(rows: Any, source: sft.DatasetConfig) -> list[tuple[int, EvaluationRow]]:
    reader = row_reader(rows, source)
    asked = ((index, evaluation_row(reader(row, index), dict(row))) for index, row in enumerate(rows))
    return [(index, question) for index, question in asked if question is not None]


def _losses(run: SFTRunConfig, rows: Any, model: Any, tokenizer: Any) -> tuple[dict[str, float], dict[int, dict[str, Any]]]:  # fmt: skip
    """Loss and perplexity over all trained tokens, and those of each row."""
    source = run.sources[0].model_copy(update={"preserve_columns": [ROW]})
    tokens = tokenize_sft(
        rows.add_column(ROW, list(range(len(rows)))),
        tokenizer,
        source,
        max_length=longest_input(run.model.name_or_path, tokenizer, run.model.max_seq_length),
        completion_only_loss=run.train.completion_only_loss,
        assistant_only_loss=run.train.assistant_only_loss,
    )
    losses = row_losses(model, tokens.__getitem__, tokens["length"][:], batch_size=batch_size(run))
    total = sum(losses, TokenLoss())
    records = {
        number: {"row": number, "tokens": loss.tokens, "perplexity": loss.perplexity}
        for number, loss in zip(tokens[ROW], losses, strict=True)
    }
    return {"loss": total.mean, "perplexity": total.perplexity}, records


def evaluate_pairs(run: SFTRunConfig, rows: Any, *, reward_model: bool) -> SavedEvaluation:
    """Which of two answers the model prefers: by its score (a reward model), or by its log-probability, in nats.

    For a language model `logps/*` are means of summed log-probabilities, `logps/accuracies` the share of pairs whose chosen
    answer is likelier, and perplexity is that of the chosen answers.
    """
    return _scored_pairs(run, rows) if reward_model else _likelier(run, rows)


def _scored_pairs(run: SFTRunConfig, rows: Any) -> SavedEvaluation:
    from aligntune.rewards.model import RewardModel, read_scale

    pairs, name = _pairs(run, rows), run.model.name_or_path
    model, tokenizer = load_for_evaluation(run, saved_head(name))
    if adapter_base(name) is not None:
        read_scale(model, name)
    longest = longest_input(name, tokenizer, run.model.max_seq_length)
    judge = RewardModel(model, tokenizer, batch_size=batch_size(run), max_length=longest)
    prompts: list[Any] = [pair.prompt for pair in pairs]
    chosen = judge(prompts, [pair.chosen for pair in pairs])
    rejected = judge(prompts, [pair.rejected for pair in pairs])
    records = [
        _record(number, pair) | {"chosen_score": high, "rejected_score": low}
        for number, (pair, high, low) in enumerate(zip(pairs, chosen, rejected, strict=True))
    ]
    return SavedEvaluation(preference_metrics(chosen, rejected), records, PREFERENCE)


def _likelier(run: SFTRunConfig, rows: Any) -> SavedEvaluation:
    texts = _pairs(run, rows)
    model, tokenizer = load_for_evaluation(run)
    pairs = _tokenized_pairs(run, rows, tokenizer)
    chosen, rejected = (_side_losses(model, pairs, side, batch_size(run)) for side in ("chosen_ids", "rejected_ids"))
    margins = [worse.nll - better.nll for better, worse in zip(chosen, rejected, strict=True)]
    metrics = {
        "logps/accuracies": sum(margin > 0 for margin in margins) / len(margins),
        "logps/margins": math.fsum(margins) / len(margins),
        "logps/chosen": -math.fsum(loss.nll for loss in chosen) / len(chosen),
        "logps/rejected": -math.fsum(loss.nll for loss in rejected) / len(rejected),
        "perplexity": sum(chosen, TokenLoss()).perplexity,
    }
    records = [
        _record(number, texts[number])
        | {"chosen_logp": -better.nll, "rejected_logp": -worse.nll, "chosen_tokens": better.tokens, "rejected_tokens": worse.tokens}
        for number, better, worse in zip(pairs[ROW], chosen, rejected, strict=True)
    ]  # fmt: skip
    return SavedEvaluation(metrics, records, PREFERENCE)


def _pairs(run: SFTRunConfig, rows: Any) -> list[PairExample]:
    reader = row_reader(rows, pairs_config(run.sources[0]), "preference")
    pairs = [reader(row, index) for index, row in enumerate(rows)]
    return [pair for pair in pairs if isinstance(pair, PairExample)]


def _tokenized_pairs(run: SFTRunConfig, rows: Any, tokenizer: Any) -> Any:
    config = pairs_config(run.sources[0])
    chat = tokenizer.chat_template is not None or config.chat_template is not None
    config = config.model_copy(update={"task_type": "conversation" if chat else "text", "preserve_columns": [ROW]})
    longest = longest_input(run.model.name_or_path, tokenizer, run.model.max_seq_length)
    return tokenize_pairs(rows.add_column(ROW, list(range(len(rows)))), tokenizer, config, max_length=longest)


def _side_losses(model: Any, pairs: Any, side: str, size: int) -> list[TokenLoss]:
    """The losses of one answer to each prompt, of which the answer counts."""

    def row(place: int) -> dict[str, list[int]]:
        pair = pairs[place]
        prompt, answer = pair["prompt_ids"], pair[side]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    lengths = list_lengths(pairs, "prompt_ids") + list_lengths(pairs, side)
    return row_losses(model, row, lengths.tolist(), batch_size=size)


def _record(number: int, pair: PairExample) -> dict[str, Any]:
    return {"row": number, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def pairs_config(source: sft.DatasetConfig) -> rl.DatasetConfig:
    """The same dataset, read as preference pairs."""
    names = set(rl.DatasetConfig.model_fields) & set(sft.DatasetConfig.model_fields) - {
        "task_type",
        "auto_detect_fields",
    }
    given = {name: getattr(source, name) for name in names if source.is_set(name)}
    return rl.DatasetConfig(**given, config_name=source.subset)
