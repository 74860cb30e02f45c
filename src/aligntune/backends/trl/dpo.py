"""DPO by TRL's `DPOTrainer`: our pairs, our reference, our evaluation; the loss and the loop are TRL's.

TRL tokenises text in its constructor and has no switch for it. Our tokens travel in columns of their own beside a one-letter
text, and the collator puts them where TRL's collator looks, so that masks, lengths and truncation are the same on every
backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from aligntune.trainers.arguments import training_arguments
from aligntune.trainers.length_groups import GroupsByLength
from aligntune.trainers.pairs_evaluating import PairsEvaluation
from aligntune.trainers.reference import KeepsReference, Reference, SavesReference

if TYPE_CHECKING:
    from aligntune.config.run import RLRunConfig
    from aligntune.trainers.pairs import PairsSession

TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


class ExactDPOTrainer(KeepsReference, PairsEvaluation, GroupsByLength, DPOTrainer):
    """`DPOTrainer` whose evaluation is exact under any batch size, and ours."""

    held_out: Any = None
    """The evaluation rows, with the reference's log-probabilities if those are computed before."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **_: Any
    ) -> dict[str, float]:
        return super().evaluate(self.held_out if eval_dataset is None else eval_dataset, ignore_keys, metric_key_prefix)


def algorithm_arguments(run: RLRunConfig) -> dict[str, Any]:
    """The fields of `DPOConfig` that make TRL's loss the run's."""
    train, source = run.train, run.sources[0]
    weights = train.losses  # type: ignore[attr-defined]
    if train.rpo_alpha:
        weights["sft"] = weights.get("sft", 0.0) + train.rpo_alpha
    return {
        "loss_type": list(weights),
        "loss_weights": list(weights.values()),
        "beta": train.beta,
        "label_smoothing": train.label_smoothing,
        "f_divergence_type": train.f_divergence_type,
        "f_alpha_divergence_coef": 1 - train.f_alpha_divergence_coef,  # TRL's 1 is reverse KL, the paper's forward KL
        "ld_alpha": train.ld_alpha,
        "use_weighting": train.use_weighting,
        "discopop_tau": train.discopop_tau,
        "sync_ref_model": train.sync_ref_model,
        "ref_model_mixup_alpha": train.ref_model_mixup_alpha,
        "ref_model_sync_steps": train.ref_model_sync_steps,
        "precompute_ref_log_probs": source.precompute_ref_log_probs,
        "precompute_ref_batch_size": source.precompute_ref_batch_size or train.per_device_eval_batch_size,
    }


def dpo_trainer(session: PairsSession, callbacks: Sequence[Any]) -> ExactDPOTrainer:
    """The trainer of a session, with nothing left to TRL's defaults."""
    run = session.config
    reference = None if session.precomputes else Reference.build(session, session.model)
    held_out = session.precomputed(session.eval_rows) if session.precomputes else session.eval_rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        arguments = training_arguments(
            run,
            session.directory.checkpoints,
            session.precision,
            cls=DPOConfig,
            disable_dropout=run.model.disable_dropout,
            max_length=None,
            padding_free=False,
            **session.loader_arguments(),
            **algorithm_arguments(run),
        )
        trainer = ExactDPOTrainer(
            model=session.model,
            ref_model=reference.model if reference is not None and reference.mode == "copy" else None,
            args=arguments,
            data_collator=_Collator(DataCollatorForPreference(pad_token_id=session.tokenizer.pad_token_id)),
            train_dataset=_rows(session.train_rows),
            eval_dataset=None if session.eval_rows is None else _rows(session.eval_rows),
            processing_class=session.tokenizer,
            callbacks=list(callbacks),
        )
    if "ref" in getattr(session.model, "peft_config", {}):
        # TRL's copy of the new adapter, which says what the base alone says; it would be saved with the model.
        session.model.delete_adapter("ref")
    set_seed(
        run.train.seed
    )  # computing the reference has drawn random numbers, which would decide the order of the rows
    trainer.set_algorithm(session.spec, run.train, reference)
    if run.train.sync_ref_model and reference is not None:
        reference.moved = True  # by TRL
        trainer.add_callback(SavesReference(trainer))
    trainer.held_out, trainer.quality = held_out, session.shots
    return trainer


def _rows(rows: Any) -> Any:
    """Our tokens as `our_*`, beside text for TRL to tokenise: apart by spaces, over which no tokenizer merges (or it warns)."""
    count = len(rows)
    kept = rows.select_columns([*TOKENS, "length"]).rename_columns({name: f"our_{name}" for name in TOKENS})
    for name, text in (("prompt", "a"), ("chosen", " b"), ("rejected", " c")):
        kept = kept.add_column(name, [text] * count)
    return kept


class _Collator:
    """TRL's collator on our tokens."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        return self.inner([row | {name: list(row[f"our_{name}"]) for name in TOKENS} for row in rows])
