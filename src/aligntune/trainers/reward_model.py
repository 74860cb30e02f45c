"""How is a reward model trained? By regression on texts that reward functions labelled, or on preference pairs.

Both put a head with one output on a model (`AutoModelForSequenceClassification`), read texts exactly as `RewardModel`
will when it scores, and run on `transformers.Trainer` inside `recording`: the folder gets checkpoints, trail and report,
and the model in `output_dir/model`.

Regression learns standardised labels; their mean and standard deviation are written to the model's config
(`reward_scale`), and `RewardModel` undoes them: scores come out in the reward's own units.
Pairs: Bradley-Terry, -log sigmoid(r_chosen - r_rejected - margin), arXiv 2203.02155 eq. 1 and 2307.09288 eq. 2.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from aligntune.config.base import LoraSettings
from aligntune.config.enums import PrecisionType
from aligntune.config.rewards import RewardModelTrainingConfig
from aligntune.errors import ConfigError, DataError, ModelError, RewardError
from aligntune.models.files import adapter_base, explain_missing, is_model_folder
from aligntune.models.heads import settle
from aligntune.models.load import merge_adapter
from aligntune.models.lora import add_lora
from aligntune.models.precision import device, resolve_precision
from aligntune.models.save import save_model
from aligntune.models.tokenizer import fit_embeddings, load_tokenizer
from aligntune.reporting import provenance, recording
from aligntune.rewards import RewardSet
from aligntune.rewards.model import RewardModel
from aligntune.trainers.callbacks import attach_recorder
from aligntune.trainers.ranks import world_size

logger = logging.getLogger(__name__)

LEAST_TEXTS = 10


@dataclass(frozen=True)
class RewardTraining:
    """What both kinds of training take. `lora`: train an adapter and the head, and save just these."""

    base: str
    output_dir: str
    epochs: int = 3
    learning_rate: float = 1e-5
    batch_size: int = 8
    gradient_accumulation_steps: int = 4
    max_length: int = 512
    lora: LoraSettings | None = None
    held_out: float = 0.1
    """Share of the rows that is not trained on but measured."""
    centering: float = 0.0
    """Pairs: weight of (r_chosen + r_rejected)^2, which holds scores near zero (arXiv 2312.09244)."""
    precision: PrecisionType = PrecisionType.AUTO
    seed: int = 42
    trust_remote_code: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass
class Trained:
    """`folder` holds the model; `model` is it, loaded; `metrics` are of the rows held out."""

    folder: Path
    model: RewardModel
    metrics: dict[str, float] = field(default_factory=dict)


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
        config.gradient_accumulation_steps, config.max_length, **options,
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
        judge.encode("", text) | {"labels": (label - mean) / std} for text, label in zip(texts, labels, strict=True)
    ]

    def measure(held: Sequence[int]) -> dict[str, float]:
        scores = judge([""] * len(held), [texts[at] for at in held])
        wanted = [labels[at] for at in held]
        errors = [(score - label) ** 2 for score, label in zip(scores, wanted, strict=True)]
        return {"rank_correlation": rank_correlation(scores, wanted), "mse": math.fsum(errors) / len(errors)}

    return _fit(settings, judge, rows, RegressionTrainer, measure)


def train_on_pairs(rows: Sequence[Mapping[str, Any]], settings: RewardTraining) -> Trained:
    """Learn from `rows` with `prompt`, `chosen`, `rejected` and perhaps `margin` (a number by which chosen should lead).

    Metrics on held-out pairs: `accuracy` (share with chosen above rejected) and `margin` (mean difference).

    Raises:
        DataError: fewer than 2 pairs, or a margin that is not a finite number.
    """
    if len(rows) < 2:
        raise DataError(f"{len(rows)} preference pairs: at least 2 are needed, one of them to measure on")
    judge = _model(settings)
    encoded = []
    for place, row in enumerate(rows):
        margin = row.get("margin") or 0.0
        if not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise DataError(f"row {place}: margin is {margin!r}; it must be a finite number")
        sides = [judge.encode(row["prompt"], row[name])["input_ids"] for name in ("chosen", "rejected")]
        encoded.append({"chosen": sides[0], "rejected": sides[1], "margin": float(margin)})

    def measure(held: Sequence[int]) -> dict[str, float]:
        prompts = [rows[at]["prompt"] for at in held]
        good = judge(prompts, [rows[at]["chosen"] for at in held])
        bad = judge(prompts, [rows[at]["rejected"] for at in held])
        leads = [one - other for one, other in zip(good, bad, strict=True)]
        return {"accuracy": sum(lead > 0 for lead in leads) / len(leads), "margin": math.fsum(leads) / len(leads)}

    return _fit(settings, judge, encoded, PairTrainer, measure)


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


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: Pearson correlation of the ranks, ties at their mean rank. NaN when either side is constant."""
    x, y = (torch.tensor(_ranks(values), dtype=torch.float64) for values in (one, other))
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: at for at, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]


# Trainers ---------------------------------------------------------------------------------------------------------------


class RegressionTrainer(Trainer):
    """Mean squared error of one score per text [B] against its standardised label [B]."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        scores = model(**inputs).logits.float()[:, 0]
        loss = functional.mse_loss(scores, labels)
        return (loss, {"scores": scores}) if return_outputs else loss


class PairTrainer(Trainer):
    """Bradley-Terry loss; chosen [B, T] and rejected [B, T] go through the model as one batch [2B, T]."""

    centering = 0.0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        margin = inputs.pop("margin")
        good, bad = model(**inputs).logits.float()[:, 0].chunk(2)
        loss = pair_loss(good, bad, margin, self.centering)
        return (loss, {"chosen": good, "rejected": bad}) if return_outputs else loss


def pair_loss(
    good: torch.Tensor, bad: torch.Tensor, margin: torch.Tensor | float = 0.0, centering: float = 0.0
) -> torch.Tensor:
    """Mean of -log sigmoid(good - bad - margin) + centering (good + bad)^2 over a batch [B]."""
    loss = -functional.logsigmoid(good - bad - margin).mean()
    return loss + centering * (good + bad).square().mean() if centering else loss


# What both share --------------------------------------------------------------------------------------------------------


def _model(settings: RewardTraining) -> RewardModel:
    """The base with a head of one output (its own head, where it has one), ready to encode and to train."""
    if world_size() > 1:
        raise ConfigError("a reward model is trained on one process: run `aligntune reward train` first, then name its folder with reward_path")  # fmt: skip
    name = settings.base
    is_model_folder(name)
    trust: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    base = adapter_base(name)
    set_seed(settings.seed)
    weights = resolve_precision(settings.precision).weights(trained=settings.lora is None)
    try:
        tokenizer = load_tokenizer(name, generates=False, **trust)
        config = AutoConfig.from_pretrained(base or name, num_labels=1, **trust)
        model = AutoModelForSequenceClassification.from_pretrained(base or name, config=config, dtype=weights, **trust)
    except (OSError, KeyError, ValueError) as error:  # what transformers raises for missing and unknown models
        raise ModelError(explain_missing(name, "base model", error)) from error
    if base is not None:
        model = merge_adapter(model, name)
    settle(model, tokenizer)
    fit_embeddings(model, tokenizer)
    if settings.lora is not None:
        model = add_lora(model, settings.lora, head=True)
    model.to(device())
    judge = RewardModel(model, tokenizer, batch_size=settings.batch_size)
    judge.max_length = min(judge.max_length, settings.max_length)
    return judge


def _fit(settings: RewardTraining, judge: RewardModel, rows: list[Any], trainer_class: Any, measure: Any) -> Trained:
    """Train on all rows but those held out, measure, and write the model."""
    order = list(range(len(rows)))
    random.Random(settings.seed).shuffle(order)
    count = min(len(rows) - 1, max(1 if len(rows) < 30 else 3, round(settings.held_out * len(rows))))
    held, kept = sorted(order[:count]), sorted(order[count:])
    with recording(
        settings.output_dir, title="reward model", resume=_resume(settings), overwrite=settings.overwrite
    ) as (run, recorder):  # fmt: skip
        run.write_json("provenance.json", provenance.collect(seeds={"seed": settings.seed}))
        trainer = trainer_class(
            judge.model, _arguments(settings, run.checkpoints), train_dataset=[rows[at] for at in kept],
            data_collator=Collator(judge.tokenizer), processing_class=judge.tokenizer,
        )  # fmt: skip
        trainer.model_accepts_loss_kwargs = False  # our losses are means, so the Trainer divides by the accumulation
        trainer.centering = settings.centering
        attach_recorder(trainer, recorder, run)
        trainer.train(
            resume_from_checkpoint=str(run.latest_checkpoint()) if settings.resume and run.latest_checkpoint() else None
        )
        judge.model.eval()
        metrics = measure(held)
        recorder.section(
            "table", "Held-out rows", {"columns": ["metric", "value"], "rows": [list(item) for item in metrics.items()]}
        )
        with run.staged("model") as folder:
            save_model(judge.model, judge.tokenizer, folder)
    logger.info("reward model, %d rows held out: %s", len(held), metrics)
    return Trained(run.model, judge, metrics | {"held_out_rows": len(held)})


def _resume(settings: RewardTraining) -> Path | int | None:
    from aligntune.reporting import RunDirectory

    return (RunDirectory(settings.output_dir).latest_checkpoint() or 0) if settings.resume else None


def _arguments(settings: RewardTraining, checkpoints: Path) -> TrainingArguments:
    compute = resolve_precision(settings.precision).compute
    return TrainingArguments(
        output_dir=str(checkpoints), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size, gradient_accumulation_steps=settings.gradient_accumulation_steps,
        seed=settings.seed, data_seed=settings.seed, bf16=compute is torch.bfloat16, fp16=compute is torch.float16,
        use_cpu=device().type == "cpu", report_to="none", disable_tqdm=True, log_level="error", logging_steps=1,
        logging_nan_inf_filter=False, save_strategy="epoch", save_total_limit=1, remove_unused_columns=False,
        dataloader_pin_memory=device().type == "cuda",
    )  # fmt: skip


class Collator:
    """Rows of texts -> [B, T] and labels [B]; rows of pairs -> [2B, T], all chosen before all rejected, and margin [B]."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "chosen" in rows[0]:
            sides = [{"input_ids": row[name]} for name in ("chosen", "rejected") for row in rows]
            return self._pad(sides) | {"margin": torch.tensor([row["margin"] for row in rows])}
        texts = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        return self._pad(texts) | {"labels": torch.tensor([row["labels"] for row in rows])}

    def _pad(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer.pad(rows, padding=True, padding_side="right", return_tensors="pt"))
