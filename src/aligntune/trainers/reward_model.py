"""How is a reward model trained? By regression on texts that reward functions labelled, or on preference pairs.

Both put a head with one output on a model (`AutoModelForSequenceClassification`), read texts exactly as `RewardModel`
will when it scores, and run on `transformers.Trainer` inside `recording`: the folder gets config, provenance,
checkpoints, trail and report as any run, and the model in `output_dir/model`. Some rows are held out and measured at
every evaluation (`reward_held_out`); the weights that are kept are those of the best one.

Regression learns standardised labels; their mean and standard deviation are written to the model's config
(`reward_scale`; beside an adapter to a file of that name), and `RewardModel` undoes them: scores come out in the reward's own units.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments, set_seed

from aligntune.config.base import LoraSettings
from aligntune.config.dump import section_to_yaml
from aligntune.config.enums import PrecisionType
from aligntune.config.rewards import RewardModelTrainingConfig
from aligntune.data.fingerprint import fingerprint
from aligntune.errors import ConfigError, DataError, ModelError, RewardError
from aligntune.models.files import adapter_base, adapters_of, explain_missing, is_model_folder
from aligntune.models.heads import settle
from aligntune.models.load import merge_adapter
from aligntune.models.lora import add_lora
from aligntune.models.precision import device, resolve_precision
from aligntune.models.save import save_model
from aligntune.models.tokenizer import fit_embeddings, load_tokenizer
from aligntune.reporting import RunDirectory, provenance, recording
from aligntune.rewards import RewardSet
from aligntune.rewards.model import RewardModel, adapter_files
from aligntune.trainers.callbacks import attach_recorder
from aligntune.trainers.quiet import quiet_libraries
from aligntune.trainers.ranks import world_size
from aligntune.trainers.resuming import fit
from aligntune.trainers.reward_held_out import HeldPairs, HeldTexts
from aligntune.trainers.reward_trainer import (
    EvaluatesLast,
    RewardCollator,
    RewardTrainer,
    RowLosses,
    pair_losses,
    text_losses,
)

logger = logging.getLogger(__name__)

LEAST_TEXTS = 10
FALLING = ("loss", "mse")
"""Metrics of the rows held out that are better when lower."""


@dataclass(frozen=True)
class RewardTraining:
    """What both kinds of training take. `lora`: train an adapter and the head, and save just these."""

    base: str
    output_dir: str
    epochs: int = 3
    learning_rate: float = 1e-5
    batch_size: int = 8
    gradient_accumulation_steps: int = 4
    micro_batch_tokens: int | None = field(default=None, kw_only=True)
    """Most tokens of a forward and backward pass, padding included; a longer batch is cut into several."""
    max_length: int = 512
    lora: LoraSettings | None = None
    held_out: float = 0.1
    """Share of the rows that is not trained on but measured, above 0 and below 1. Rows of one prompt stay together."""
    eval_interval: int | None = None
    """Optimiser steps from one evaluation and checkpoint to the next. Unset: an epoch."""
    best_metric: str | None = "loss"
    """The weights kept are those of the evaluation that is best by it (pairs: loss, accuracy, margin; texts: loss, mse,
    rank_correlation). None: the last ones."""
    centering: float = 0.0
    """Pairs: weight of (r_chosen + r_rejected)^2, which holds scores near zero (arXiv 2312.09244)."""
    precision: PrecisionType = PrecisionType.AUTO
    seed: int = 42
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(
                f"held_out: {self.held_out:g} should be a share above 0 and below 1; the rows held out tell how good the model "
                "is, so some always are"
            )


@dataclass
class Trained:
    """`folder` holds the model; `model` is it, loaded; `metrics` are of the rows held out."""

    folder: Path
    model: RewardModel
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    """What differs between texts and pairs. `keys`: rows of one key are held out together."""

    rows: list[dict[str, Any]]
    keys: Sequence[Hashable]
    losses: RowLosses
    measure: Callable[[Sequence[int]], HeldTexts | HeldPairs]
    config: str
    data: tuple[str, list[Any]]


def train_on_texts(config: RewardModelTrainingConfig, *, tokenizer: Any = None, **options: Any) -> Trained:
    """Distil the weighted sum of `config.reward_functions` into a model. `options`: further fields of `RewardTraining`.

    Texts on which no reward applies are left out. Metrics: `rank_correlation` (Spearman) and `mse` on held-out texts,
    in the reward's units.

    Raises:
        DataError: fewer than 10 texts have a label.
        RewardError: a label that is not finite, all labels alike, or weights that do not fit.
    """
    settings = RewardTraining(
        config.base_model_name, config.output_dir, config.num_epochs, config.learning_rate, config.batch_size,
        config.gradient_accumulation_steps, config.max_length, micro_batch_tokens=config.micro_batch_tokens,
        **{"eval_interval": config.eval_interval} | options,
    )  # fmt: skip
    texts, labels = label_texts(config)
    mean = math.fsum(labels) / len(labels)
    std = math.sqrt(math.fsum((label - mean) ** 2 for label in labels) / len(labels))
    if std == 0:
        raise RewardError(
            f"every text has the label {mean:g}: there is nothing to learn; choose other texts or rewards"
        )
    judge = _model(settings)
    judge.model.config.reward_scale = [mean, std]
    rows = [
        {"text": judge.encode("", text), "label": (label - mean) / std}
        for text, label in zip(texts, labels, strict=True)
    ]

    def measure(held: Sequence[int]) -> HeldTexts:
        return HeldTexts(judge, [texts[at] for at in held], [labels[at] for at in held], std)

    written = section_to_yaml("reward_training", config, _rest(settings))
    data = ("training_texts", list(zip(texts, labels, strict=True)))
    return _train(settings, judge, _Task(rows, texts, text_losses, measure, written, data))


def train_on_pairs(
    rows: Sequence[Mapping[str, Any]], settings: RewardTraining, *, source: str | None = None
) -> Trained:
    """Learn from `rows` with `prompt`, `chosen`, `rejected` and perhaps `margin` (a number by which chosen should lead).

    Metrics on held-out pairs: `accuracy` (share with chosen above rejected) and `margin` (mean difference). `source`:
    where the rows are from, for the run's files.

    Raises:
        DataError: fewer than 2 pairs, a row without a text, or a margin that is not a finite number.
    """
    if len(rows) < 2:
        raise DataError(f"{len(rows)} preference pairs: at least 2 are needed, one of them to measure on")
    for place, row in enumerate(rows):
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(name), str | Sequence):
                raise DataError(f"row {place}: {name} is {row.get(name)!r}; it must be a text or a list of messages")
    judge = _model(settings)
    judge.model.config.reward_scale = None  # that of a distilled model: pairs have no units
    encoded = []
    for place, row in enumerate(rows):
        margin = row.get("margin") or 0.0
        if not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise DataError(f"row {place}: margin is {margin!r}; it must be a finite number")
        sides = {name: judge.encode(row["prompt"], row[name]) for name in ("chosen", "rejected")}
        encoded.append(sides | {"label": float(margin)})

    def measure(held: Sequence[int]) -> HeldPairs:
        return HeldPairs(judge, [rows[at] for at in held], settings.centering)

    losses = partial(pair_losses, centering=settings.centering)
    keys = [json.dumps(row["prompt"], default=str) for row in rows]
    written = yaml.safe_dump({"reward_pairs": {"pairs": source} | _plain(settings)}, sort_keys=False)
    data = (source or "pairs", [[row.get(name) for name in ("prompt", "chosen", "rejected", "margin")] for row in rows])
    return _train(settings, judge, _Task(encoded, keys, losses, measure, written, data))


def label_texts(config: RewardModelTrainingConfig) -> tuple[list[str], list[float]]:
    """The texts that have a label, and their labels: the weighted sum of the reward functions."""
    rewards = RewardSet(config.reward_functions, config.reward_weights)
    texts = config.training_texts
    columns = {} if config.reference_texts is None else {"reference": config.reference_texts}
    totals = rewards.score([""] * len(texts), texts, columns).total
    kept = [(text, label) for text, label in zip(texts, totals, strict=True) if label is not None]
    if len(kept) < LEAST_TEXTS:
        raise DataError(f"{len(kept)} of {len(texts)} texts have a label; a reward model needs at least {LEAST_TEXTS}")
    for text, label in kept:
        if not math.isfinite(label):
            raise RewardError(f"the label of {text[:80]!r} is {label}: labels must be finite")
    return [text for text, _ in kept], [label for _, label in kept]


# What both share --------------------------------------------------------------------------------------------------------


def _model(settings: RewardTraining) -> RewardModel:
    """The base with a head of one output, ready to encode and to train: its own head, or a new one in place of another size."""
    if world_size() > 1:
        raise ConfigError("a reward model is trained on one process: run `aligntune reward train` first, then name its folder with reward_path")  # fmt: skip
    quiet_libraries()
    name = settings.base
    is_model_folder(name)
    trust: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    base = adapter_base(name)
    set_seed(settings.seed)
    weights = resolve_precision(settings.precision).weights(trained=settings.lora is None)
    try:
        tokenizer = load_tokenizer(name, generates=False, **trust)
        config = AutoConfig.from_pretrained(base or name, **trust)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_pretrained(
            base or name, config=config, dtype=weights, ignore_mismatched_sizes=True, **trust
        )
    except (OSError, KeyError, ValueError) as error:  # what transformers raises for missing and unknown models
        raise ModelError(explain_missing(name, "base model", error)) from error
    if base is not None:
        model = merge_adapter(model, name)
        model.lies_on = [base, *adapters_of(name)]
    settle(model, tokenizer)
    fit_embeddings(model, tokenizer)
    if settings.lora is not None:
        model = add_lora(model, settings.lora, head=True)
    model.to(device())
    tokenizer.model_max_length = settings.max_length  # saved with the model: it will be scored as it was trained
    return RewardModel(model, tokenizer, batch_size=settings.batch_size)


def hold_out(keys: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(places to train on, places held out). Rows of one key stay together where there are at least 10 keys."""
    if len(set(keys)) < LEAST_TEXTS:
        keys = range(len(keys))
    wanted = min(len(keys) - 1, max(1 if len(keys) < 10 else 2 if len(keys) < 30 else 3, round(share * len(keys))))
    order = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(order)
    members: dict[Hashable, list[int]] = {key: [] for key in order}
    for place, key in enumerate(keys):
        members[key].append(place)
    held: list[int] = []
    for key in order[:-1]:
        if len(held) >= wanted:
            break
        held += members[key]
    return sorted(set(range(len(keys))) - set(held)), sorted(held)


def _train(settings: RewardTraining, judge: RewardModel, task: _Task) -> Trained:
    """Train on all rows but those held out, measure these, and write the model."""
    names = task.measure([]).names
    if settings.best_metric not in (None, *names):
        raise ConfigError(f"best_metric: {settings.best_metric} is not measured; choose of {', '.join(names)}, or none")
    kept, held = hold_out(task.keys, settings.held_out, settings.seed)
    judge.model.beside = adapter_files(judge.model)
    directory = RunDirectory(settings.output_dir)
    checkpoint = directory.latest_checkpoint() if settings.resume else None
    resume = (checkpoint or 0) if settings.resume else None
    with recording(settings.output_dir, title="reward model", resume=resume, overwrite=settings.overwrite) as (run, recorder):  # fmt: skip
        run.write_text("config.yaml", task.config)
        run.write_json("provenance.json", _provenance(settings, task, kept, held))
        measure = task.measure(held)
        trainer = RewardTrainer(
            judge.model, _arguments(settings, run.checkpoints), row_losses=task.losses, measure=measure,
            train_dataset=[task.rows[at] for at in kept], eval_dataset=[task.rows[at] for at in held],
            data_collator=RewardCollator(judge.tokenizer, settings.micro_batch_tokens),
            micro_batch_tokens=settings.micro_batch_tokens, processing_class=judge.tokenizer,
            callbacks=[EvaluatesLast()],
        )  # fmt: skip
        attach_recorder(trainer, recorder, run)
        fit(trainer, checkpoint)
        judge.model.eval()
        metrics = measure()
        if settings.best_metric is not None:
            start, best = trainer.before.get(settings.best_metric), trainer.state.best_metric
            if (
                start is not None
                and best is not None
                and (start < best) == (settings.best_metric in FALLING)
                and start != best
            ):
                recorder.note(f"before the first step {settings.best_metric} was {start:.4g}, better than after any: a lower learning_rate may help", "warning")  # fmt: skip
            recorder.note(f"kept the weights of step {trainer.state.best_global_step}, the best by {settings.best_metric} on the rows held out")  # fmt: skip
        recorder.section(
            "table", "Held-out rows", {"columns": ["metric", "value"], "rows": [list(item) for item in metrics.items()]}
        )
        with run.staged("model") as folder:
            save_model(judge.model, judge.tokenizer, folder)
    logger.info("reward model, %d rows held out: %s", len(held), metrics)
    return Trained(run.model, judge, metrics | {"held_out_rows": len(held)})


def _arguments(settings: RewardTraining, checkpoints: Path) -> TrainingArguments:
    compute = resolve_precision(settings.precision).compute
    strategy, best = "epoch" if settings.eval_interval is None else "steps", settings.best_metric
    return TrainingArguments(
        output_dir=str(checkpoints), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size, gradient_accumulation_steps=settings.gradient_accumulation_steps,
        seed=settings.seed, data_seed=settings.seed, bf16=compute is torch.bfloat16, fp16=compute is torch.float16,
        use_cpu=device().type == "cpu", report_to="none", disable_tqdm=True, log_level="error", logging_steps=1,
        logging_nan_inf_filter=False, remove_unused_columns=False, dataloader_pin_memory=device().type == "cuda",
        accelerator_config={"non_blocking": device().type == "cuda"},
        eval_strategy=strategy, eval_steps=settings.eval_interval, eval_on_start=True,
        save_strategy=strategy, save_steps=settings.eval_interval or 500, save_total_limit=1,
        load_best_model_at_end=best is not None, metric_for_best_model=best,
        greater_is_better=None if best is None else best not in FALLING,
    )  # fmt: skip


# What the run's folder says ---------------------------------------------------------------------------------------------


def _provenance(settings: RewardTraining, task: _Task, kept: list[int], held: list[int]) -> dict[str, Any]:
    name, rows = task.data
    data = [
        {"role": role, "name": name, "rows": len(places), "fingerprint": fingerprint([rows[at] for at in places])}
        for role, places in (("train", kept), ("eval", held))
    ]
    precision = resolve_precision(settings.precision).name
    return provenance.collect(seeds={"seed": settings.seed}, data=data, backend="native", precision=precision)


def _plain(settings: RewardTraining) -> dict[str, Any]:
    """The settings as plain data; how a session starts (`resume`, `overwrite`) is no property of the run."""
    plain = asdict(settings) | {"precision": settings.precision.value}
    return {name: value for name, value in plain.items() if name not in ("resume", "overwrite")}


def _rest(settings: RewardTraining) -> str:
    """The settings that `reward_training` does not have."""
    names = ("held_out", "best_metric", "precision", "seed")
    return "trained with " + ", ".join(f"{name}={_plain(settings)[name]}" for name in names)
