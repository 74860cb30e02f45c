"""Supervised fine-tuning by TRL's `SFTTrainer`, fed with rows that we tokenised, masked and packed.

TRL's own preparation is skipped (`skip_prepare_dataset`): its `completion_only_loss` is silently ignored on chat data
and its `assistant_only_loss` depends on markers in the template. Collation is ours too, so that packing and padding-free
batches are the same on every backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl import SFTConfig, SFTTrainer

from aligntune.trainers.arguments import training_arguments
from aligntune.trainers.evaluating import LanguageModelEvaluation
from aligntune.trainers.filling import FillsLastBatch
from aligntune.trainers.length_groups import GroupsByLength

if TYPE_CHECKING:
    from aligntune.trainers.sft import SFTSession


class ExactSFTTrainer(LanguageModelEvaluation, FillsLastBatch, GroupsByLength, SFTTrainer):
    """`SFTTrainer` whose evaluation loss is exact under any batch size."""

    def _set_signature_columns_if_needed(self) -> None:
        """Those that `remove_unused_columns` keeps: TRL would drop the positions, by which packed documents stay apart."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), "position_ids"]


def sft_trainer(session: SFTSession, callbacks: Sequence[Any]) -> ExactSFTTrainer:
    """The trainer of a session, with nothing left to TRL's defaults."""
    train = session.config.train
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        arguments = training_arguments(
            session.config,
            session.directory.checkpoints,
            session.precision,
            cls=SFTConfig,
            loss_type=train.loss_type,
            activation_offloading=train.activation_offloading,
            max_length=None,
            packing=False,
            padding_free=False,
            assistant_only_loss=False,
            completion_only_loss=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            **session.loader_arguments(),
        )
        trainer = ExactSFTTrainer(
            model=session.model,
            args=arguments,
            data_collator=session.collator,
            train_dataset=session.train_rows,
            eval_dataset=session.eval_rows,
            processing_class=session.tokenizer,
            callbacks=list(callbacks),
        )
    session.set_up_evaluation(trainer)
    return trainer
