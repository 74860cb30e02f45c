"""Supervised fine-tuning: which rows, which loss, what it looks like before and after."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aligntune.algorithms.sft import dft
from aligntune.config.best_metric import goes_by_metric
from aligntune.config.sft import DatasetConfig, TrainingConfig
from aligntune.data import (
    PackedCollator,
    PackedOrPaddedCollator,
    PaddedCollator,
    pack,
    plain,
    preview,
    tokenize_sft,
)
from aligntune.data.examples import Example, TextExample
from aligntune.evaluation.answers import EvaluationRow
from aligntune.evaluation.evaluator import AnswerEvaluator
from aligntune.evaluation.registry import check_best_metric, metrics_from_config
from aligntune.models.forward import causal_model, check_packed, runs_padded, use_padding
from aligntune.models.positions import check_positions
from aligntune.models.tokenizer import load_tokenizer
from aligntune.trainers.answering import AnsweringSession
from aligntune.trainers.arguments import own_optimizer, training_arguments
from aligntune.trainers.compiling import compile_model
from aligntune.trainers.own import own_token_loss
from aligntune.trainers.packed_sft import PackedRowsCollator, PackedSFTTrainer

logger = logging.getLogger(__name__)


class SFTSession(AnsweringSession):
    """A run of one of the four language-modelling tasks."""

    row_kind = "sft"
    samples = 4

    # Parts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.templated(
            load_tokenizer(self.config.model.name_or_path, pad_token=self.config.sources[0].pad_token)
        )

    @cached_property
    def train_rows(self) -> Any:
        packing = self.config.train.packing
        return self._packed(self.mixed([self._tokenized(source, packing) for source in self.config.sources]), packing)

    @cached_property
    def eval_rows(self) -> Any | None:
        source = self.config.eval_source
        if source is None:
            self.say_that_evaluation_is_off()
            return None
        self.train_rows  # noqa: B018  (they decide the template of a tokenizer that has none)
        train = self.config.train
        packing = train.packing if train.eval_packing is None else train.eval_packing
        return self._packed(self._tokenized(source, packing), packing)

    @cached_property
    def model(self) -> Any:
        return self._backend.load_policy(self, tokenizer=self.tokenizer)

    @property
    def collator(self) -> PackedCollator | PaddedCollator:
        """Concatenates where padding is unwanted, else pads what was not packed by `bfd`."""
        train = self.config.train
        if train.padding_free:
            return PackedCollator(train.pad_to_multiple_of)
        return PackedOrPaddedCollator(self.tokenizer.pad_token_id, train.pad_to_multiple_of)

    def _tokenized(self, source: DatasetConfig, packing: bool) -> Any:
        train = self.config.train
        wrapped = packing and train.packing_strategy == "wrapped"
        return tokenize_sft(
            self.raw_rows(source),
            self.tokenizer,
            source,
            max_length=None if wrapped else self.config.model.max_seq_length,
            completion_only_loss=train.completion_only_loss,
            assistant_only_loss=train.assistant_only_loss,
        )

    def _packed(self, rows: Any, packing: bool) -> Any:
        if not packing:
            return rows
        return pack(rows, self.config.model.max_seq_length, self.config.train.packing_strategy)

    # Training -------------------------------------------------------------------------------------------------------

    def loader_arguments(self) -> dict[str, Any]:
        """Fields of `TrainingArguments` that only supervised fine-tuning sets."""
        train = self.config.train
        return {
            "dataloader_num_workers": train.dataloader_num_workers,
            "dataloader_drop_last": train.dataloader_drop_last,
            "remove_unused_columns": train.remove_unused_columns,
            "train_sampling_strategy": "group_by_length" if train.group_by_length else "random",
            "length_column_name": "length",
            "label_smoothing_factor": train.label_smoothing_factor,
            "eval_accumulation_steps": train.eval_accumulation_steps,
            "prediction_loss_only": True,
        }

    def native_trainer(self, callbacks: Sequence[Any]) -> PackedSFTTrainer:
        """One padding-free forward, the head on trained tokens only."""
        train, rows, held_out = self.config.train, self.train_rows, self.eval_rows
        if not train.packing and hasattr(rows, "__len__"):  # a stream's are checked as they come
            check_positions(causal_model(self.model), max(rows["length"][:]))
        if problem := check_packed(self.model):
            logger.info("rows are padded: %s", problem)
            use_padding(self.model)
        compile_model(self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            arguments = training_arguments(
                self.config, self.directory.checkpoints, self.precision, **self.loader_arguments()
            )
            trainer = PackedSFTTrainer(
                self.model,
                arguments,
                token_loss=_token_loss(train),
                micro_batch_tokens=train.micro_batch_tokens,
                data_collator=PackedRowsCollator(
                    train.pad_to_multiple_of, train.micro_batch_tokens, padded=runs_padded(self.model)
                ),
                train_dataset=rows.with_format("numpy"),
                eval_dataset=None if held_out is None else held_out.with_format("numpy"),
                processing_class=self.tokenizer,
                callbacks=list(callbacks),
                **own_optimizer(self.config, arguments),
            )
        if train.activation_offloading:
            trainer.offload_activations()
        self.set_up_evaluation(trainer)
        return trainer

    def set_up_evaluation(self, trainer: Any) -> None:
        """Give a trainer with `LanguageModelEvaluation` the metrics that the run asks for."""
        trainer.with_perplexity = self.config.evaluation.compute_perplexity
        if self.eval_rows is not None and self.evaluator is not None:
            trainer.quality = self.evaluator

    @cached_property
    def evaluator(self) -> AnswerEvaluator | None:
        """Metrics of answers to the evaluation rows, checked; None when the run asks for none."""
        source = self.config.eval_source
        rows = [] if source is None else [row for row in self.questions(source) if row.columns.get("_text") is None]
        metrics = metrics_from_config(self.config.evaluation, has_references=bool(rows))
        others = ["loss", "runtime"] + (["perplexity"] if self.config.evaluation.compute_perplexity else [])
        if goes_by_metric(self.config):
            check_best_metric(self.config.train.metric_for_best_model, metrics, others)
        if not metrics:
            return None
        limits, seed = self.config.evaluation, self.config.train.seed
        evaluator = AnswerEvaluator(
            self.generator, rows, metrics, limits.max_new_tokens, limits.max_samples_for_quality_metrics, seed
        )
        evaluator.check()
        return evaluator

    # Questions ------------------------------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        return any(not isinstance(question.prompt, str) for question in self.sample_questions)

    @property
    def answer_tokens(self) -> int:
        return self.config.evaluation.max_new_tokens

    def question(self, example: Example, columns: Mapping[str, Any]) -> EvaluationRow | None:
        """Raw text is cut in the middle, and marked, since its rest is no answer."""
        return _cut_text(example.text) if isinstance(example, TextExample) else super().question(example, columns)

    def answers(self, asked: Sequence[EvaluationRow], max_new_tokens: int) -> list[str]:
        """No longer than half of what the model can read."""
        settings = self.config.model
        longest = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or settings.max_seq_length
        )
        return super().answers(asked, min(max_new_tokens, max(1, longest // 2)))

    # What a user calls ----------------------------------------------------------------------------------------------

    def preview(self, rows: int = 3) -> list[list[Any]]:
        """Tokens of the first rows, each with whether it is trained."""
        return preview(self.first_rows(rows), self.tokenizer, rows)

    def describe(self) -> str:
        first = plain(preview(self.train_rows, self.tokenizer, 1)[0])
        return f"{super().describe()}\nfirst row, trained tokens in [[ ]]:\n{first}"


def _cut_text(text: str) -> EvaluationRow | None:
    words = text.split(" ")
    half = len(words) // 2
    return EvaluationRow(" ".join(words[:half]), " " + " ".join(words[half:]), {"_text": True}) if half else None


def _token_loss(train: TrainingConfig) -> Callable[[Tensor], Tensor] | None:
    """The loss of each trained token from its log-probability; None for plain cross-entropy, which needs no log-probabilities."""
    if train.loss_function is not None:
        return own_token_loss(train.loss_function)
    return {"nll": None, "dft": dft}[train.loss_type]
