"""What does `create_*_trainer` return? A session: one run, from its config to a model and a report.

A session loads nothing until it is asked to act, so that a wrong setting is reported before a model is read from disk.
What differs between kinds of training (rows, loss, metrics) is in its subclasses; who loads the model and which
trainer runs is the backend's part.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from aligntune.config.dump import origin_rows, to_yaml
from aligntune.config.resolve import Resolved
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.models.precision import Precision, resolve_precision
from aligntune.reporting import provenance
from aligntune.reporting.console import open_console
from aligntune.reporting.events import Recorder, TrailSink
from aligntune.reporting.page import write_report
from aligntune.reporting.run import RunDirectory
from aligntune.reporting.sinks import check_loggers, open_loggers
from aligntune.trainers.callbacks import attach_recorder
from aligntune.trainers.quiet import quiet_libraries
from aligntune.trainers.ranks import is_main_process

logger = logging.getLogger(__name__)


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

    # What a user calls --------------------------------------------------------------------------------------------

    def train(self, resume: str | bool | None = None, overwrite: bool = False) -> dict[str, float]:
        """Train, evaluate, save the model to `output_dir/model` and write the report. Returns the final metrics.

        `resume`: True or "auto" continues from the last checkpoint (from the start when there is none); a path names
        one. `overwrite` replaces the results of another run in the folder.
        """
        checkpoint = self._checkpoint(resume)
        logging_config = self.config.logging
        explicit = logging_config.is_set("loggers")
        check_loggers(logging_config.loggers, explicit=explicit)
        if not is_main_process():
            self._run(checkpoint)
            return self.metrics
        resume_from = checkpoint if checkpoint is not None else (0 if resume else None)
        self.directory = RunDirectory.create(self.directory.path, resume=resume_from, overwrite=overwrite)
        with self.directory.session():
            loggers = open_loggers(
                logging_config.loggers,
                explicit=explicit,
                run=self.directory,
                run_name=logging_config.run_name,
                config={row["path"]: row["value"] for row in origin_rows(self.resolved)},
                **self.logger_options(),
            )
            console = open_console(logging_config.log_level, title=self.config.algorithm.value)
            self.recorder = Recorder([TrailSink(self.directory), console, *loggers], step=self.directory.resumed_from)
            try:
                self._run(checkpoint)
            finally:
                self.recorder.close()
        self._write_page()
        return self.metrics

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Metrics on the evaluation data, `eval_` in front of each name."""

    @abstractmethod
    def predict(self, inputs: Any, **options: Any) -> list[Any]:
        """What the model says to each input."""

    @abstractmethod
    def preview(self, rows: int = 3) -> list[list[Any]]:
        """Tokens of the first rows, each with whether it is trained."""

    def save_model(self, path: str | Path | None = None, *, merge: bool = False) -> Path:
        """Write the model with tokenizer, chat template, generation config and card; returns the folder.

        A LoRA run saves its adapter; `merge` writes full weights with the adapter added in. Unset, `path` is
        `output_dir/model`.
        """
        from aligntune.models.save import save_model

        folder = Path(path) if path is not None else self.directory.model
        save_model(self.model, self.tokenizer, folder, merge=merge, card=self._card())
        return folder

    def push_to_hub(self, repo_id: str, *, private: bool = True, merge: bool = False) -> str:
        """Upload the model to the hub (token: `HF_TOKEN` or `hf auth login`); returns its address."""
        from aligntune.models.save import push_folder

        return push_folder(self.save_model(merge=merge), repo_id, private=private)

    def describe(self) -> str:
        """What would be trained: data, steps and the chosen backend, as text."""
        reasons = "".join(f"\n  not {reason}" for reason in self.reasons)
        return f"{self.config.algorithm.value} on backend {self.backend}{reasons}\nrows: {len(self.train_rows)}"

    # Parts, loaded when first used ----------------------------------------------------------------------------------

    @cached_property
    def precision(self) -> Precision:
        return resolve_precision(self.config.model.precision)

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

    @abstractmethod
    def build_trainer(self) -> Any:
        """The `transformers.Trainer` of this run."""

    def before(self) -> None:
        """Called before training, with everything loaded."""

    def after(self) -> None:
        """Called after training and evaluation, before the model is saved."""

    def logger_options(self) -> dict[str, Any]:
        """Further arguments for the loggers."""
        return {}

    def fingerprints(self) -> list[Mapping[str, Any]]:
        """One entry per dataset for the provenance file."""
        return []

    # ----------------------------------------------------------------------------------------------------------------

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        if resume is None or resume is False:
            return None
        return self.directory.latest_checkpoint() if resume in (True, "auto") else Path(str(resume))

    def _run(self, checkpoint: Path | None) -> None:
        quiet_libraries()
        self._write_config()
        for reason in self.reasons:
            self.recorder.note(f"backend {self.backend}: not {reason}")
        self.train_rows, self.eval_rows, self.model  # noqa: B018  (load: errors in data before those in training)
        self._write_provenance()
        if checkpoint is None:
            self.before()
        trainer = self.trainer = self.build_trainer()
        attach_recorder(trainer, self.recorder, self.directory if is_main_process() else None)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        self.metrics = self.final_metrics(trainer)
        self.after()
        if is_main_process():
            with self.directory.staged("model") as folder:
                self.save_model(folder)

    def final_metrics(self, trainer: Any) -> dict[str, float]:
        """The metrics of the trained model: an evaluation where there is data, and the training loss."""
        found = {"train_loss": _last_train_loss(trainer)} if _last_train_loss(trainer) is not None else {}
        if self.eval_rows is not None:
            found |= trainer.evaluate()
        return {name: value for name, value in found.items() if isinstance(value, (int, float))}

    def _write_config(self) -> None:
        if is_main_process():
            self.directory.write_text("config.yaml", to_yaml(self.resolved))
            self.directory.write_json("config.origins.json", origin_rows(self.resolved))

    def _write_provenance(self) -> None:
        if not is_main_process():
            return
        train = self.config.train
        facts = provenance.collect(
            seeds={"seed": train.seed, "data_seed": train.data_seed if train.data_seed is not None else train.seed},
            data=self.fingerprints(),
            backend=self.backend,
            backend_reasons=self.reasons,
            precision=self.precision.name,
        )
        self.directory.write_json("provenance.json", facts)

    def _write_page(self) -> None:
        write_report(self.directory)

    def _card(self) -> dict[str, Any]:
        run: SFTRunConfig | RLRunConfig = self.config
        return {
            "base_model": run.model.name_or_path,
            "algorithm": run.algorithm.value,
            "datasets": [source.name for source in run.sources],
            "metrics": self.metrics,
            "backend": self.backend,
        }


def _last_train_loss(trainer: Any) -> float | None:
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return float(losses[-1]) if losses else None
