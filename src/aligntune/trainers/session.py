"""What does `create_*_trainer` return? A session: one run, from its config to a model and a report.

A session loads nothing until it is asked to act, so that a wrong setting is reported before a model is read from disk.
What differs between kinds of training (rows, loss, metrics) is in its subclasses; who loads the model and which
trainer runs is the backend's part.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from aligntune.config.dump import origin_rows, to_yaml
from aligntune.config.resolve import Resolved
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.data import load_rows, mix, rows_fingerprint, use_template
from aligntune.errors import ConfigError, DataError
from aligntune.models.precision import Precision, resolve_precision
from aligntune.models.save import push_folder, save_model
from aligntune.reporting import Recorder, RunDirectory, provenance, recording
from aligntune.trainers.arguments import splits
from aligntune.trainers.callbacks import attach_recorder
from aligntune.trainers.keeping import keeping_callbacks
from aligntune.trainers.native import NativeTrainer
from aligntune.trainers.own import own_callbacks
from aligntune.trainers.parallel import full_state, wait_for_all
from aligntune.trainers.quiet import quiet_libraries
from aligntune.trainers.ranks import is_main_process, rank, world_size
from aligntune.trainers.resuming import fit, other_rows

logger = logging.getLogger(__name__)

HEAD = 1000
"""Raw rows that a preview reads at least."""


class Session(ABC):
    """One run. `config` is the resolved run, `backend` the name of the chosen backend, `metrics` the last results."""

    def __init__(self, resolved: Resolved, backend: Any, reasons: Sequence[str] = ()) -> None:
        self.resolved = resolved
        self.config: Any = resolved.config
        self.backend: str = backend.name
        self.reasons = list(reasons)
        """Why each backend that was asked before gave way."""
        self.metrics: dict[str, float] = {}
        self.directory = RunDirectory(self.config.logging.output_dir)
        self.recorder = Recorder()
        self._backend = backend
        self._read: dict[str, Any] = {}
        quiet_libraries()

    # What a user calls --------------------------------------------------------------------------------------------

    def train(self, resume: str | bool | None = None, overwrite: bool = False) -> dict[str, float]:
        """Train, evaluate, save the model to `output_dir/model` and write the report. Returns the final metrics.

        `resume`: True or "auto" continues from the last checkpoint (from the start when there is none); a path names
        one. `overwrite` replaces the results of another run in the folder.
        """
        checkpoint = self._checkpoint(resume)
        settings = self.config.logging
        with recording(
            settings.output_dir,
            rank=rank(),
            loggers=self.loggers(),
            loggers_explicit=settings.is_set("loggers"),
            run_name=settings.run_name,
            config={row["path"]: row["value"] for row in origin_rows(self.resolved)},
            log_level=settings.log_level,
            title=self.config.algorithm.value,
            resume=checkpoint if checkpoint is not None else (0 if resume else None),
            overwrite=overwrite,
            **self.logger_options(),
        ) as (self.directory, self.recorder):
            self._run(checkpoint)
        return self.metrics

    def evaluate(self) -> dict[str, float]:
        """Metrics on the evaluation data, `eval_` in front of each name. Raises `ConfigError` without any."""
        if self.eval_rows is None:
            raise ConfigError("there is nothing to evaluate on: give eval_dataset or eval_split")
        trainer = getattr(self, "trainer", None) or self.build_trainer()
        self.metrics = {name: value for name, value in trainer.evaluate().items() if isinstance(value, (int, float))}
        return self.metrics

    @abstractmethod
    def predict(self, inputs: Any, **options: Any) -> list[Any]:
        """What the model says to each input."""

    @abstractmethod
    def preview(self, rows: int = 3) -> list[list[Any]]:
        """Tokens of the first rows, each with whether it is trained."""

    def save_model(self, path: str | Path | None = None, *, merge: bool = False) -> Path:
        """Write the model with tokenizer, chat template, generation config and card; returns the folder.

        A LoRA run saves its adapter; `merge` writes full weights with the adapter added in. Unset, `path` is
        `output_dir/model`. In a run of several processes each must call it; the main one writes.
        """
        folder = Path(path) if path is not None else self.directory.model
        state = full_state(getattr(self, "trainer", None))
        if is_main_process():
            self.write_model(folder, state, merge=merge)
        wait_for_all()
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = True, merge: bool = False) -> str:
        """Upload the model to the hub (token: `HF_TOKEN` or `hf auth login`); returns its address."""
        return push_folder(self.save_model(merge=merge), repo_id, private=private)

    def describe(self) -> str:
        """What would be trained: data, steps and the chosen backend, as text."""
        lines = [
            f"{self.config.algorithm.value} on backend {self.backend}",
            *(f"  not {reason}" for reason in self.reasons),
        ]
        held_out = "no evaluation data" if self.eval_rows is None else f"{_count(self.eval_rows)} evaluation rows"
        lines.append(f"{_count(self.train_rows)} training rows, {held_out}")
        steps = self.optimizer_steps()
        lines.append(f"{steps if steps is not None else 'an unknown number of'} optimiser steps")
        return "\n".join(lines)

    def optimizer_steps(self) -> int | None:
        """Steps of this run on as many processes as now; None when a stream does not tell."""
        train = self.config.train
        if train.max_steps is not None:
            return int(train.max_steps)
        batches = self._batches()
        return None if batches is None else int(-(-batches // train.gradient_accumulation_steps) * (train.epochs or 1))

    def _batches(self) -> int | None:
        """Batches of each process in one pass; None when a stream does not tell."""
        if not hasattr(self.train_rows, "__len__"):
            return None
        size = self.config.train.per_device_batch_size * world_size()
        drops = getattr(self.config.train, "dataloader_drop_last", False)
        return len(self.train_rows) // size if drops else -(-len(self.train_rows) // size)

    # Parts, loaded when first used ----------------------------------------------------------------------------------

    @cached_property
    def precision(self) -> Precision:
        found = resolve_precision(self.config.model.precision)
        return replace(found, split=splits(self.config) and found.compute is torch.bfloat16)

    @property
    def data_seed(self) -> int:
        """Seed of drawing, mixing and ordering rows."""
        train = self.config.train
        return int(train.seed if train.data_seed is None else train.data_seed)

    def raw_rows(self, source: Any) -> Any:
        """The rows of a dataset before they are tokenised; read once a session."""
        key = repr(source)
        if key not in self._read:
            options = getattr(self.config.train, "dataset_kwargs", {})  # of SFT alone
            self._read[key] = load_rows(source, seed=self.data_seed, load_kwargs=options)
        return self._read[key]

    def first_rows(self, count: int) -> Any:
        """`count` training rows or more, the first ones. Of one dataset whose rows stay apart no others are tokenised."""
        source, head = self.config.sources[0], max(HEAD, 2 * count)
        apart = len(self.config.sources) == 1 and not getattr(self.config.train, "packing", False)
        raw = self.raw_rows(source)
        if apart and "train_rows" not in vars(self) and isinstance(raw, Dataset) and len(raw) > head:
            self.tokenizer  # noqa: B018  (one for both)
            part = copy(self)
            part._read = {**self._read, repr(source): raw.select(range(head))}
            with suppress(DataError):  # the same error comes of all rows, or these were all dropped
                if len(part.train_rows) >= count:
                    return part.train_rows
        return self.train_rows

    def say_that_evaluation_is_off(self) -> None:
        if self.config.logging.eval_strategy != "no":
            logger.info(
                "no evaluation data (eval_dataset or eval_split): evaluation and keeping the best model are off"
            )

    def mixed(self, parts: Sequence[Any]) -> Any:
        """The training datasets' tokenised rows as one: by weight where a weight was given, else every row once."""
        sources = self.config.sources
        weights = [source.weight for source in sources] if any(source.is_set("weight") for source in sources) else None
        return mix(parts, weights, seed=self.data_seed)

    def templated(self, tokenizer: Any) -> Any:
        """`tokenizer` with the chat template that the datasets name: one for the run, whichever rows are read first.

        Raises:
            ConfigError: they name several.
        """
        sources = [source for source in (*self.config.sources, self.config.eval_source) if source is not None]
        named = list(dict.fromkeys(source.chat_template for source in sources if source.chat_template is not None))
        if len(named) > 1:
            raise ConfigError(
                "chat_template: a run has one, which is saved with the model, and the datasets name several: "
                + ", ".join(f"{template!r:.60}" for template in named)
            )
        if named:
            use_template(tokenizer, named[0])
        return tokenizer

    @cached_property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer, with padding token and chat template."""

    @cached_property
    @abstractmethod
    def train_rows(self) -> Any:
        """The rows to train on, tokenised."""

    @cached_property
    @abstractmethod
    def eval_rows(self) -> Any | None:
        """The rows to evaluate on, tokenised, or None."""

    @cached_property
    @abstractmethod
    def model(self) -> Any:
        """The model that is trained."""

    # What subclasses fill in ----------------------------------------------------------------------------------------

    def callbacks(self) -> list[Any]:
        """What the trainer calls beside its own: those that keep the best weights, then the user's."""
        return [*keeping_callbacks(self.config), *own_callbacks(self.config)]

    def build_trainer(self) -> Any:
        """The `transformers.Trainer` of this run, by its backend."""
        return self._backend.build_trainer(self, self.callbacks())

    @abstractmethod
    def native_trainer(self, callbacks: Sequence[Any]) -> NativeTrainer:
        """Our own trainer of this run, which is what the native backend builds."""

    @abstractmethod
    def show_samples(self, step: int) -> None:
        """Record what the model says to a few rows: before the first step and after the last, for the report."""

    def after(self) -> None:  # noqa: B027  (a hook)
        """Called after training and evaluation, before the model is saved."""

    def loggers(self) -> str | Sequence[str]:
        """The loggers of this run."""
        found: str | Sequence[str] = self.config.logging.loggers
        return found

    def logger_options(self) -> dict[str, Any]:
        """Further arguments for the loggers."""
        return {}

    def fingerprints(self) -> list[Mapping[str, Any]]:
        """One entry per dataset for the provenance file."""
        found: list[Mapping[str, Any]] = []
        for role, source in [*(("train", source) for source in self.config.sources), ("eval", self.config.eval_source)]:
            if source is None:
                continue
            rows = self.raw_rows(source)
            known = hasattr(rows, "__len__")
            found.append({"role": role, "name": source.name, "split": source.split, "rows": len(rows) if known else None,
                          "fingerprint": rows_fingerprint(rows) if known else None})  # fmt: skip
        return found

    # ----------------------------------------------------------------------------------------------------------------

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        if resume is None or resume is False:
            return None
        return self.directory.latest_checkpoint() if resume in (True, "auto") else Path(str(resume))

    def _run(self, checkpoint: Path | None) -> None:
        self._write_config()
        for reason in self.reasons:
            self.recorder.note(f"backend {self.backend}: not {reason}")
        self.train_rows, self.eval_rows, self.model  # noqa: B018  (load: errors in data before those in training)
        if self._batches() == 0:
            raise ConfigError(
                f"train.dataloader_drop_last: the {len(self.train_rows)} training rows do not fill one batch of "
                f"{self.config.train.per_device_batch_size} on each of {world_size()} process(es), so nothing would be trained"
            )
        if is_main_process():
            self._write_provenance(checkpoint)
        if checkpoint is None:
            self.show_samples(0)
        trainer = self.trainer = self.build_trainer()
        attach_recorder(trainer, self.recorder, self.directory if is_main_process() else None)
        fit(trainer, checkpoint)
        best = trainer.state.best_global_step
        if self.config.schedule.keep_best and best is not None:
            self.recorder.note(f"kept the weights of step {best}, the best by {trainer.args.metric_for_best_model}")
        self.metrics = self.final_metrics(trainer)
        self.show_samples(int(trainer.state.global_step))
        self.after()
        state = full_state(trainer)
        if is_main_process():
            with self.directory.staged("model") as folder:
                self.write_model(folder, state)
        wait_for_all()

    def write_model(self, folder: Path, state: Any = None, *, merge: bool = False) -> None:
        """Write the model to `folder`, on this process alone; `state`: the gathered weights of a sharded model."""
        save_model(self.model, self.tokenizer, folder, merge=merge, card=self._card(), state=state)

    def final_metrics(self, trainer: Any) -> dict[str, float]:
        """The metrics of the weights that are saved: their evaluation, and the last training loss.

        An evaluation of these weights that was made while training is not made again.
        """
        history, state = trainer.state.log_history, trainer.state
        losses = [entry["loss"] for entry in history if "loss" in entry]
        found = {"train_loss": losses[-1]} if losses else {}
        if self.eval_rows is not None:
            step = state.best_global_step if self.config.schedule.keep_best else state.global_step
            known = [entry for entry in history if entry["step"] == step and _is_evaluation(entry)]
            found |= known[-1] if known else trainer.evaluate()
        return {name: float(value) for name, value in found.items() if _is_result(name, value)}

    def _write_config(self) -> None:
        if is_main_process():
            self.directory.write_text("config.yaml", to_yaml(self.resolved))
            self.directory.write_json("config.origins.json", origin_rows(self.resolved))

    def _write_provenance(self, checkpoint: Path | None) -> None:
        """Write it, and say what decides the rows and differs from the run of `checkpoint`."""
        train, name = self.config.train, self.directory.provenance.name
        facts = provenance.collect(
            seeds={"seed": train.seed, "data_seed": self.data_seed},
            data=self.fingerprints(),
            backend=self.backend,
            backend_reasons=self.reasons,
            precision=self.precision.name,
            rows_per_step=train.per_device_batch_size * train.gradient_accumulation_steps * world_size(),
        )
        for sentence in [] if checkpoint is None else other_rows(checkpoint.resolve().parent.parent / name, facts):
            self.recorder.note(sentence, level="warning")
        self.directory.write_json(name, facts)

    def _card(self) -> dict[str, Any]:
        run: SFTRunConfig | RLRunConfig = self.config
        return {
            "base_model": run.model.name_or_path,
            "algorithm": run.algorithm.value,
            "datasets": [source.name for source in run.sources],
            "metrics": self.metrics,
            "backend": self.backend,
        }


def _count(rows: Any) -> str:
    return str(len(rows)) if hasattr(rows, "__len__") else "streamed"


def _is_evaluation(entry: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in entry)


def _is_result(name: str, value: Any) -> bool:
    """A number that says how good the model is, not how fast it was computed."""
    timing = name.endswith(("_runtime", "_per_second")) or name in ("epoch", "step")
    return isinstance(value, (int, float)) and not timing
