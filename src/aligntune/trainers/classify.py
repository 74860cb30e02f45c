"""Classification of texts and of words: which rows, which head, what it looks like before, during and after.

One session for both tasks, on `transformers.Trainer`. The metrics of `evaluation.labels` come with every evaluation, so
that each can be `metric_for_best_model`; the report shows the scores per class and what was taken for what.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset

from aligntune.config.best_metric import goes_by_metric
from aligntune.config.enums import TaskType
from aligntune.config.sft import DatasetConfig
from aligntune.data import PaddedCollator, row_reader, tokenize_classes, tokenize_tags
from aligntune.data.examples import LabelledExample, TaggedExample
from aligntune.data.labels import LabelSet, find_shared_labels, labels_for, labels_of_model
from aligntune.data.masks import IGNORED
from aligntune.data.preview import row_tokens
from aligntune.errors import ConfigError
from aligntune.evaluation.answers import choose
from aligntune.evaluation.classifier import Classifier
from aligntune.evaluation.label_scores import metric_names, spans
from aligntune.evaluation.registry import check_best_metric, custom_metrics
from aligntune.models.heads import SavedHead, head_arguments, head_class, head_files, longest_input, saved_head, settle
from aligntune.models.tokenizer import load_tokenizer
from aligntune.trainers.arguments import training_arguments
from aligntune.trainers.label_evaluation import RowCollator, Scorer, report_sections
from aligntune.trainers.label_trainer import ClassificationTrainer
from aligntune.trainers.session import Session

logger = logging.getLogger(__name__)

SAMPLES = 8
"""Rows classified before and after training, for the report."""


class ClassificationSession(Session):
    """A run of `text_classification` or `token_classification`."""

    # Parts ----------------------------------------------------------------------------------------------------------

    @property
    def task(self) -> TaskType:
        task: TaskType = self.config.sources[0].task_type
        return task

    @property
    def tags(self) -> bool:
        """Whether words are classified, rather than texts."""
        return self.task is TaskType.TOKEN_CLASSIFICATION

    @cached_property
    def tokenizer(self) -> Any:
        model = self.config.model.name_or_path
        return load_tokenizer(model, pad_token=self.config.sources[0].pad_token, generates=False)

    @cached_property
    def labels(self) -> LabelSet:
        """The classes: those of the training rows, in the order of the model's own head when it knows just these."""
        found = find_shared_labels(
            [(rows, source) for source, rows in zip(self.config.sources, self._sources, strict=True)],
            num_labels=self.config.model.num_labels,
        )
        head = saved_head(self.config.model.name_or_path)
        if head is not None and head.task is self.task and set(head.names) == set(found.names):
            return labels_of_model(head.names, found)
        return found

    @cached_property
    def eval_labels(self) -> LabelSet:
        """The same classes, as the evaluation rows write them; without any, as the training rows do."""
        source = self.config.eval_source
        return self.labels if source is None else labels_for(self._eval_source, source, self.labels)

    @cached_property
    def train_rows(self) -> Any:
        pairs = zip(self._sources, self.config.sources, strict=True)
        return self.mixed([self._tokenized(rows, source, self.labels) for rows, source in pairs])

    @cached_property
    def eval_rows(self) -> Any | None:
        """With `row`, the place of each row, by which predictions find theirs again."""
        source = self.config.eval_source
        if source is None:
            self.say_that_evaluation_is_off()
            return None
        rows = self._tokenized(self._eval_source, source, self.eval_labels)
        return rows.add_column("row", list(range(len(rows))))

    @cached_property
    def model(self) -> Any:
        head = head_arguments(self.labels.names)
        known = saved_head(self.config.model.name_or_path)
        if known is not None and known.names != self.labels.names:
            logger.info("the model's own head is for other classes; one of another size is made anew")
        model = self._backend.load_policy(
            self, auto_class=head_class(self.task), tokenizer=self.tokenizer, ignore_mismatched_sizes=known is not None,
            **head,
        )  # fmt: skip
        settle(model, self.tokenizer)
        model.beside = head_files(SavedHead(self.task, tuple(self.labels.names)))
        return model

    @cached_property
    def max_length(self) -> int:
        """Tokens of a row: `max_seq_length`, or what the model can read if that is less."""
        model = self.config.model
        return longest_input(model.name_or_path, self.tokenizer, model.max_seq_length)

    @property
    def _sources(self) -> list[Dataset]:
        return [self.raw_rows(source) for source in self.config.sources]

    @property
    def _eval_source(self) -> Any:
        return self.raw_rows(self.config.eval_source)

    def _tokenized(self, rows: Dataset, source: DatasetConfig, labels: LabelSet) -> Dataset:
        tokenize = tokenize_tags if self.tags else tokenize_classes
        return tokenize(rows, self.tokenizer, source, labels, max_length=self.max_length)

    # Training -------------------------------------------------------------------------------------------------------

    def native_trainer(self, callbacks: Sequence[Any]) -> ClassificationTrainer:
        train = self.config.train
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            arguments = training_arguments(
                self.config,
                self.directory.checkpoints,
                self.precision,
                dataloader_num_workers=train.dataloader_num_workers,
                dataloader_drop_last=train.dataloader_drop_last,
                remove_unused_columns=train.remove_unused_columns,
                train_sampling_strategy="group_by_length" if train.group_by_length else "random",
                length_column_name="length",
                label_smoothing_factor=train.label_smoothing_factor,
                eval_accumulation_steps=train.eval_accumulation_steps,
                label_names=["labels", "row"],
            )
            return ClassificationTrainer(
                self.model,
                arguments,
                micro_batch_tokens=train.micro_batch_tokens,
                data_collator=RowCollator(
                    PaddedCollator(self.tokenizer.pad_token_id, train.pad_to_multiple_of), train.micro_batch_tokens
                ),
                train_dataset=self.train_rows,
                eval_dataset=self.eval_rows,
                processing_class=self.tokenizer,
                compute_metrics=self.scorer,
                callbacks=list(callbacks),
            )

    @cached_property
    def scorer(self) -> Scorer:
        """What turns an evaluation's predictions into metrics; checked before training."""
        custom = custom_metrics(self.config.evaluation.custom_metrics or [])
        names = self.labels.names
        if goes_by_metric(self.config):
            check_best_metric(
                self.config.train.metric_for_best_model, custom, ["loss", "runtime", *metric_names(names, self.tags)]
            )
        columns = {}
        if self.eval_rows is not None:
            columns = {name: self.eval_rows[name][:] for name in self.config.eval_source.preserve_columns or ()}
        for entry in custom:
            entry.check(columns)
        return Scorer(names, self.tags, custom, columns)

    def after(self) -> None:
        step = int(self.trainer.state.global_step)
        if self.eval_rows is None:
            return
        kept = self.trainer.state.best_global_step if self.config.schedule.keep_best else step
        evaluated = [entry["step"] for entry in self.trainer.state.log_history if "eval_loss" in entry]
        if self.scorer.last is None or evaluated[-1:] != [kept]:
            self.trainer.predict(self.eval_rows)
        assert self.scorer.last is not None, "predict() has just scored the rows"
        for kind, title, payload in report_sections(self.scorer.last):
            self.recorder.section(kind, title, payload, group="Classes", step=step)

    def show_samples(self, step: int) -> None:
        chosen = self._sample_examples
        inputs = [example.tokens if isinstance(example, TaggedExample) else example.text for example in chosen]
        for example, found in zip(chosen, self.classifier.predict(inputs), strict=True):
            self.recorder.sample(step, self._record(example, found))

    def _record(self, example: LabelledExample | TaggedExample, found: Any) -> dict[str, Any]:
        names = self.labels.names
        if isinstance(example, TaggedExample):
            wanted = spans(names, example.tokens, [names[self.eval_labels.id_of(tag)] for tag in example.tags])
            return {"prompt": " ".join(example.tokens), "completion": _said(found), "reference": _said(wanted), "spans": found}  # fmt: skip
        reference = names[self.eval_labels.id_of(example.label)]
        return {"prompt": example.text, "completion": found["label"], "reference": reference} | found

    @cached_property
    def _sample_examples(self) -> list[Any]:
        source = self.config.eval_source or self.config.sources[0]
        rows = self._sources[0] if self.config.eval_source is None else self._eval_source
        reader = row_reader(rows, source)
        examples = [reader(rows[place], place) for place in choose(len(rows), SAMPLES, self.data_seed)]
        return [example for example in examples if _not_empty(example)]

    @property
    def classifier(self) -> Classifier:
        """The model as it is, for single inputs."""
        size = max(8, self.config.train.per_device_batch_size)
        return Classifier(
            self.model, self.tokenizer, self.labels.names, self.tags, self.max_length, size, self.precision.compute
        )

    # What a user calls ----------------------------------------------------------------------------------------------

    def predict(self, inputs: Any, **options: Any) -> list[Any]:
        """Texts: `{label, probability, probabilities}` each. Words: the spans of each sentence.

        A sentence is a list of words, or a text that is split at blanks. A span has `label`, `start` and `end` (words, end
        excluded), `text` and `probability`.
        """
        if options:
            raise ConfigError(f"predict: {', '.join(options)} has no meaning for a classifier")
        return self.classifier.predict([inputs] if isinstance(inputs, str) else inputs)

    def preview(self, rows: int = 3) -> list[list[Any]]:
        """Tokens of the first rows: those that carry a tag are marked, or the class follows the text."""
        self.labels  # noqa: B018  (those of all rows)
        first, found = self.first_rows(rows), []
        for row in first.select(range(min(rows, len(first)))):
            labels = row["labels"] if self.tags else [IGNORED] * len(row["input_ids"])
            tokens = row_tokens(row["input_ids"], labels, self.tokenizer)
            found.append(tokens if self.tags else [*tokens, (f" -> {self.labels.names[row['labels']]}", True)])
        return found

    def describe(self) -> str:
        return f"{super().describe()}\nclasses: {', '.join(self.labels.names)}"


def _not_empty(example: Any) -> bool:
    return bool(example.tokens) if isinstance(example, TaggedExample) else bool(example.text.strip())


def _said(found: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{span['text']} [{span['label']}]" for span in found) or "(none)"
