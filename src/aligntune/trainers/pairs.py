"""Preference optimisation: pairs, policy and reference of a run, its evaluation, and answers before and after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from aligntune.algorithms import base as algorithms
from aligntune.config.rl import DatasetConfig
from aligntune.data import plain, preview, tokenize_pairs
from aligntune.data.masks import IGNORED
from aligntune.errors import ModelError
from aligntune.evaluation.answers import EvaluationRow
from aligntune.evaluation.preference import shot_metrics
from aligntune.models.tokenizer import load_tokenizer
from aligntune.trainers.answering import AnsweringSession
from aligntune.trainers.arguments import own_optimizer, training_arguments
from aligntune.trainers.compiling import compile_model
from aligntune.trainers.dropout import disable_dropout
from aligntune.trainers.own import with_own_functions
from aligntune.trainers.pairs_trainer import PairsTrainer
from aligntune.trainers.reference import Reference
from aligntune.trainers.reference_cache import with_reference
from aligntune.trainers.samples import SampleLogger

logger = logging.getLogger(__name__)

SHOT_TOKENS = 256
"""Longest zero-shot or few-shot answer, in tokens, unless `max_target_length` is less."""


class PairsSession(AnsweringSession):
    """A run of an algorithm that learns from preference pairs."""

    row_kind = "preference"
    samples = 3

    # Parts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> algorithms.AlgorithmSpec:
        spec = with_own_functions(algorithms.get(self.config.algorithm.value), self.config.train)
        spec.check(self.config.train)
        return spec

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        self.spec  # noqa: B018  (a loss of one's own that is not there, first)
        model = self.config.model
        tokenizer = load_tokenizer(
            model.name_or_path, pad_token=self.config.sources[0].pad_token, trust_remote_code=model.trust_remote_code
        )
        return self.templated(tokenizer)

    @cached_property
    def train_rows(self) -> Any:
        return self.mixed([self._tokenized(source) for source in self.config.sources])

    @cached_property
    def eval_rows(self) -> Any | None:
        source = self.config.eval_source
        if source is None:
            return None
        rows, limit = self._tokenized(source), self.config.train.dpo_eval_max_samples
        return rows.select(range(min(limit, len(rows)))) if limit is not None else rows

    @cached_property
    def model(self) -> Any:
        start = self.config.model.sft_path
        model = self._backend.load_policy(self, tokenizer=self.tokenizer if start is None else None)
        if model.get_input_embeddings().weight.shape[0] < len(self.tokenizer) and start is not None:
            raise ModelError(
                f"model.sft_path: {start} has fewer tokens than the tokenizer of {self.config.model.name_or_path}"
            )
        if self.config.model.disable_dropout:
            disable_dropout(model)
        return model

    @cached_property
    def precomputes(self) -> bool:
        """Whether the reference's log-probabilities are computed before training."""
        return bool(self.config.sources[0].precompute_ref_log_probs) and self.spec.needs(self.config.train).reference

    def _tokenized(self, source: DatasetConfig) -> Any:
        train = self.config.train
        longest = min(train.max_length, self.config.model.max_seq_length)
        chosen_by_user = train.is_set("max_prompt_length") or train.max_prompt_length < longest
        return tokenize_pairs(
            self.raw_rows(source),
            self.tokenizer,
            source,
            max_length=longest,
            # A default that leaves no room for answers gives way: such prompts are cut to fit, not dropped.
            max_prompt_length=train.max_prompt_length if chosen_by_user else None,
            max_target_length=train.max_target_length,
            truncation_mode=source.truncation_mode,
        )

    # Training -------------------------------------------------------------------------------------------------------

    def callbacks(self) -> list[Any]:
        found = super().callbacks()
        samples = self.config.logging.sample_logging
        if samples.enabled:
            generator = self.generator
            asked = [(prompt, generator.prompt_ids(self.as_prompt(prompt))) for prompt in samples.prompts or ()]
            asked = asked or [
                (row.prompt, generator.prompt_ids(row.prompt, row.tools)) for row in self.sample_questions
            ]
            seed, stops = self.config.train.seed, generator.stop_token_ids
            found.append(SampleLogger(samples, asked, generator.engine, self.tokenizer, self.recorder, stops, seed))
        return found

    def loader_arguments(self) -> dict[str, Any]:
        """Fields of `TrainingArguments` that say how rows become batches."""
        return {
            "train_sampling_strategy": "group_by_length" if self.config.train.group_by_length else "random",
            "length_column_name": "length",
            "remove_unused_columns": False,
        }

    def native_trainer(self, callbacks: Sequence[Any]) -> PairsTrainer:
        compile_model(self)
        for sentence in self.spec.advice(self.config.train):
            self.recorder.note(sentence, level="warning")
        rows, held_out, reference = self.with_reference()
        arguments = training_arguments(
            self.config, self.directory.checkpoints, self.precision, **self.loader_arguments()
        )
        trainer = PairsTrainer(
            self.model,
            arguments,
            spec=self.spec,
            settings=self.config.train,
            reference=reference,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=self.tokenizer,
            callbacks=list(callbacks),
            **own_optimizer(self.config, arguments),
        )
        trainer.quality = self.shots
        return trainer

    def with_reference(self) -> tuple[Any, Any, Reference | None]:
        """(training rows, evaluation rows, reference): with its log-probabilities in the rows, the reference is not kept."""
        if not self.spec.needs(self.config.train).reference:
            return self.train_rows, self.eval_rows, None
        if not self.precomputes:
            reference = Reference.build(self, self.model)
            self._check_reference(reference)
            return self.train_rows, self.eval_rows, reference
        return *self._precomputed, None

    @cached_property
    def _precomputed(self) -> tuple[Any, Any]:
        return self.precomputed(self.train_rows), self.precomputed(self.eval_rows)

    def precomputed(self, rows: Any) -> Any:
        """`rows` with the reference's log-probabilities; call it before the first step."""
        if rows is None:
            return None
        model = self.config.model
        separate = model.force_use_ref_model or model.ref_model_init_kwargs or hasattr(self.model, "peft_config")
        # Before its first step the policy is its own reference: no copy of it is needed.
        reference = Reference.build(self, self.model) if separate else Reference(self.model, "copy")
        self._check_reference(reference)
        size = self.config.sources[0].precompute_ref_batch_size or self.config.train.per_device_eval_batch_size
        mixed = self.precision.compute if self.precision.autocasts else None
        return with_reference(rows, reference, batch_size=size, autocast=mixed)

    def _check_reference(self, reference: Reference) -> None:
        rows = reference.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        known = len(self.tokenizer) - len(self.tokenizer.get_added_vocab())
        if rows < known:
            raise ModelError(
                f"the reference knows {rows} tokens and the policy's tokenizer {known}: it cannot be its reference"
            )

    # Evaluation -----------------------------------------------------------------------------------------------------

    def shots(self) -> dict[str, float]:
        """`zero_shot_*` and `few_shot_*`: greedy answers to held-out prompts, scored against the chosen answers."""
        train = self.config.train
        if not train.dpo_eval_enabled or not self.eval_questions:
            return {}
        tokens = min(train.max_target_length or SHOT_TOKENS, SHOT_TOKENS)
        common: dict[str, Any] = {"max_new_tokens": tokens, "seed": train.seed}
        found: dict[str, float] = {}
        if train.dpo_zero_shot_max_samples:
            found |= shot_metrics(
                self.generator, self.eval_questions, max_samples=train.dpo_zero_shot_max_samples, **common
            )
        if train.dpo_few_shot_max_samples:
            found |= shot_metrics(
                self.generator, self.eval_questions, max_samples=train.dpo_few_shot_max_samples, few_shot=True,
                examples_text=train.dpo_few_shot_examples_text, **common,
            )  # fmt: skip
        return found

    @cached_property
    def eval_questions(self) -> list[EvaluationRow]:
        """Held-out prompts with their chosen answers."""
        source = self.config.eval_source
        return [] if source is None else self.questions(source, self.config.train.dpo_eval_max_samples)

    @property
    def chats(self) -> bool:
        return self.config.sources[0].task_type == "conversation" and self.tokenizer.chat_template is not None

    @property
    def answer_tokens(self) -> int:
        return SHOT_TOKENS

    @property
    def sample_tokens(self) -> int:
        return 64

    # What a user calls ----------------------------------------------------------------------------------------------

    def preview(self, rows: int = 3) -> list[list[Any]]:
        """Tokens of the first pairs, the chosen side and then the rejected one, each token with whether it is trained."""
        first, sides = self.first_rows(rows), []
        for row in first.select(range(min(rows, len(first)))):
            for name in ("chosen_ids", "rejected_ids"):
                ids = [*row["prompt_ids"], *row[name]]
                sides.append({"input_ids": ids, "labels": [IGNORED] * len(row["prompt_ids"]) + list(row[name])})
        return preview(sides, self.tokenizer, len(sides))

    def describe(self) -> str:
        chosen, rejected = (plain(tokens) for tokens in self.preview(1))
        return f"{super().describe()}\nfirst pair, trained tokens in [[ ]]:\nchosen: {chosen}\nrejected: {rejected}"
