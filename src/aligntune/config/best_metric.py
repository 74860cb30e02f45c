"""Which evaluation is best? The metrics that a run's evaluations give, as far as its settings tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from aligntune.config.algorithms import DPOConfig
from aligntune.config.applies import ONLINE
from aligntune.config.enums import TaskType
from aligntune.config.optimizers import MEASURED_SCHEDULES
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.config.synonyms import Path
from aligntune.config.words import closest

ANSWER_METRICS = {
    "compute_rouge": ("rouge1", "rouge2", "rougeL"),
    "compute_bleu": ("bleu",),
    "compute_meteor": ("meteor",),
    "compute_codebleu": (
        "codebleu", "codebleu_ngram_match", "codebleu_weighted_ngram_match", "codebleu_syntax_match", "codebleu_dataflow_match",
    ),
    "compute_bertscore": ("bertscore_precision", "bertscore_recall", "bertscore_f1"),
    "compute_semantic_similarity": ("semantic_similarity",),
}  # fmt: skip
"""Setting -> the metrics of answers that it switches on."""
CLASSIFICATION_METRICS = ("accuracy", "f1_macro", "f1_weighted", "matthews_correlation")
ENTITY_METRICS = ("precision", "recall", "f1", "f1_macro", "f1_weighted", "accuracy")
PAIR_METRICS = (
    "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
)  # fmt: skip
SHOT_METRICS = ("rougeL", "bleu", "length_ratio")
"""Of answers to held-out prompts, after `zero_shot_` or `few_shot_`."""
ONLINE_METRICS = ("reward", "pass@1", "completions/mean_length", "completions/truncated_share")
OF_ONE_REWARD = re.compile("rewards/.+/(mean|accuracy)")


def goes_by_metric(config: SFTRunConfig | RLRunConfig) -> bool:
    """Whether something in the run looks at `metric_for_best_model`."""
    return (
        config.schedule.keep_best
        or getattr(config.train, "early_stopping_patience", None) is not None
        or config.train.lr_scheduler in MEASURED_SCHEDULES
    )


def less_is_better(name: str) -> bool:
    """What is taken of a metric while `greater_is_better` is unset."""
    return name.endswith(("loss", "perplexity", "truncated_share")) or "loss/" in name  # loss/nll: a part of DPO's


def unknown_metric(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    """A `metric_for_best_model` that no evaluation of the run gives. (A metric of the user's own may give any name.)"""
    name = config.schedule.best_metric
    if (
        name is None
        or not goes_by_metric(config)
        or (isinstance(config, SFTRunConfig) and config.evaluation.custom_metrics)
    ):
        return
    plain, known = name.removeprefix("eval_"), list(metrics_of(config))
    of_a_reward = config.algorithm in ONLINE and OF_ONE_REWARD.fullmatch(plain)
    if plain not in known and not of_a_reward:
        more = " More come with the compute_* settings of evaluation." if isinstance(config, SFTRunConfig) else ""
        yield ("train", "metric_for_best_model"), not_a_metric(name, known) + more


def metrics_of(config: SFTRunConfig | RLRunConfig) -> Iterator[str]:
    """The metrics of the run's evaluations, without `eval_`."""
    if isinstance(config, SFTRunConfig):
        yield from ("loss", "runtime")
        yield from _of_labels(config) or _of_texts(config)
    elif isinstance(config.train, DPOConfig):
        yield from _of_pairs(config, config.train)
    else:
        yield from ONLINE_METRICS


def _of_labels(config: SFTRunConfig) -> list[str]:
    tasks = {source.task_type for source in config.sources}
    found = list(CLASSIFICATION_METRICS) if any(task.is_classification for task in tasks) else []
    return list(dict.fromkeys([*found, *ENTITY_METRICS])) if TaskType.TOKEN_CLASSIFICATION in tasks else found


def _of_texts(config: SFTRunConfig) -> list[str]:
    asked = config.evaluation
    found = ["perplexity"] if asked.compute_perplexity else []
    return found + [name for setting, names in ANSWER_METRICS.items() if getattr(asked, setting) for name in names]


def _of_pairs(config: RLRunConfig, train: DPOConfig) -> Iterator[str]:
    yield from PAIR_METRICS
    yield from (f"loss/{name}" for name in train.losses if name != "sft")
    if train.losses.get("sft") or train.rpo_alpha:
        yield "loss/nll"
    if train.use_weighting:
        yield "wpo_weight"
    if config.has_reference:
        yield from ("kl/chosen", "kl/rejected")
    for shot in ("zero", "few"):
        if train.dpo_eval_enabled and getattr(train, f"dpo_{shot}_shot_max_samples"):
            yield from (f"{shot}_shot_{name}" for name in SHOT_METRICS)


def not_a_metric(name: str, known: Iterable[str]) -> str:
    """The message about a `metric_for_best_model` that is not among `known`."""
    names = sorted(set(known))
    close = closest(name.removeprefix("eval_"), names)
    hint = f"did you mean eval_{close}? " if close else ""
    return f"no evaluation of this run gives {name!r}; {hint}It gives {', '.join(f'eval_{one}' for one in names)}."
