"""How does `transformers.Trainer` tell the recorder what happens? One callback, for every trainer and backend.

It replaces the trainer's own printing and progress bar. Per step it touches no tensor on the host: tokens are summed
on the device and read when the trainer itself synchronises, at a log.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from aligntune.reporting import Recorder, RunDirectory
from aligntune.trainers.parallel import gathered, in_group, largest_of_all

SUMMARY = ("train_loss", "total_flos")
"""Names by which the trainer's closing log is known. It sums up one session only, so it is not a metric of the run."""
TOKENS_SEEN = "num_input_tokens_seen"
"""The log of a trainer that counts tokens itself and keeps the count in its checkpoints (`transformers.TrainingArguments`)."""
RENAMED = {TOKENS_SEEN: "num_tokens"}
DROPPED = ("train_runtime", "train_tokens_per_second")
SPLITS = ("eval", "test")
KEPT_LOGS = 1000
"""Newest training lines in a trainer's own history, beside all evaluations. Every checkpoint writes that history whole, which
grew with the square of the steps; the run's metrics.jsonl has every line."""


def attach_recorder(trainer: Trainer, recorder: Recorder, run: RunDirectory | None = None) -> RecorderCallback:
    """Give `trainer` a `RecorderCallback` in place of its printing and progress callbacks. Call it on every rank."""
    callback = RecorderCallback(recorder, run)
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(callback)
    return callback


class RecorderCallback(TrainerCallback):
    """Metrics, progress and checkpoint marks for the recorder; belongs on every rank, since tokens are summed over ranks.

    Every save and evaluation is made a log step too (unless `logging_strategy` is "no"): the mean loss of a log line
    then never spans a checkpoint, which is what makes the lines of a resumed run equal those of an uninterrupted one.

    Tokens come from the first source that has them: the log of a trainer that keeps their count (`num_input_tokens_seen`), the
    attention masks of the training forward passes, or the trainer's other logs (`num_tokens`). All count what the model
    read, padding excluded.
    """

    def __init__(self, recorder: Recorder, run: RunDirectory | None = None) -> None:
        self._recorder = recorder
        self._run = run
        self._meter: _TokenMeter | None = None
        self._replaying = False
        self._evaluated = 0
        self._history_limit = 2 * KEPT_LOGS
        self._tokens_before = self._tokens_logged = 0
        self._elapsed_before = 0.0
        self._started = self._logged = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and read from the trail what a resumed run had counted."""
        self._started = self._logged = time.monotonic()
        self._replaying = state.global_step > 0
        if self._run is not None and state.global_step > 0:
            self._tokens_before, self._elapsed_before = _counted_before(self._run)
        self._tokens_logged = self._tokens_before
        if isinstance(kwargs.get("model"), torch.nn.Module):
            self._meter = _TokenMeter(kwargs["model"])
        self._recorder.progress(state.global_step, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From the first step on, logs are new: before it, a resumed run repeats its evaluation on start."""
        self._replaying = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Move the progress, and log where an evaluation or a save follows."""
        self._recorder.progress(state.global_step, state.max_steps)
        return _log_before_saving(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """As at a step, for strategies by epoch."""
        return _log_before_saving(args, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show that an evaluation moves."""
        loader = kwargs.get("eval_dataloader")
        self._evaluated += 1
        total = len(loader) if loader is not None and has_length(loader) else None
        self._recorder.progress(self._evaluated, total, phase="eval")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The metrics themselves came by `on_log`."""
        self._evaluated = 0
        self._recorder.progress(state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record a log line of training or of an evaluation; drop the summary of the session."""
        self._shorten(state)
        if not logs or any(name in logs for name in SUMMARY):
            return
        split, values = split_of(logs)
        if split == "train":
            values |= self._measured(values, args, kept=TOKENS_SEEN in logs)
        else:
            values.pop("num_tokens", None)  # TRL repeats its own count there, which a resumed run starts anew
        if not self._replaying:
            self._recorder.metrics(state.global_step, values, split=split)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as whole."""
        if self._run is not None and state.is_world_process_zero:
            checkpoint = self._run.checkpoints / f"checkpoint-{state.global_step}"
            if checkpoint.is_dir():
                self._run.mark_checkpoint(checkpoint, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting, and say what each of several GPUs needed. Evaluations after this are new, even if there was no step left to train."""
        self._replaying = False
        if args.device.type == "cuda" and args.world_size > 1:
            peaks = gathered([torch.cuda.max_memory_allocated(args.device) / 2**30])
            self._recorder.note("peak memory by process: " + ", ".join(f"{peak:.1f}" for peak in peaks) + " GiB")
        if self._meter is not None:
            self._meter.remove()
            self._meter = None

    def _shorten(self, state: TrainerState) -> None:
        history = state.log_history
        if len(history) > self._history_limit:
            trained = [place for place, entry in enumerate(history) if split_of(entry)[0] == "train"]
            gone = set(trained[:-KEPT_LOGS])
            history[:] = [entry for place, entry in enumerate(history) if place not in gone]
            self._history_limit = len(history) + KEPT_LOGS

    def _measured(self, values: Mapping[str, Any], args: TrainingArguments, *, kept: bool) -> dict[str, Any]:
        """Tokens so far, tokens per second since the last log, seconds so far, peak memory in GiB of the device that needs most.

        `kept`: the trainer's own count goes on where an earlier session ended.
        """
        now = time.monotonic()
        found: dict[str, Any] = {"elapsed_s": round(self._elapsed_before + now - self._started, 3)}
        tokens = values["num_tokens"] if kept else self._tokens(values, args)
        if tokens is not None:
            found["num_tokens"] = tokens
            if now > self._logged and tokens > self._tokens_logged:
                found["tokens_per_second"] = (tokens - self._tokens_logged) / (now - self._logged)
            self._tokens_logged = tokens
        if args.device.type == "cuda":
            found["memory_gib"] = largest_of_all(torch.cuda.max_memory_allocated(args.device) / 2**30, args.device)
        self._logged = now
        return found

    def _tokens(self, values: Mapping[str, Any], args: TrainingArguments) -> int | None:
        local = torch.zeros((), dtype=torch.int64, device=args.device)
        if self._meter is not None:
            local = self._meter.total(args.device)
        if in_group():
            distributed.all_reduce(local)
        seen = int(local.item())
        return self._tokens_before + seen if seen else values.get("num_tokens")


def split_of(logs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The split that a log line belongs to, and its numbers without the split's prefix.

    `{"eval_loss": 1.0, "epoch": 2.0}` -> `("eval", {"loss": 1.0, "epoch": 2.0})`
    """
    for split in SPLITS:
        if any(name.startswith(f"{split}_") for name in logs):
            return split, {_bare(name.removeprefix(f"{split}_")): value for name, value in logs.items()}
    return "train", {_bare(name): value for name, value in logs.items() if name not in DROPPED}


def _bare(name: str) -> str:
    return RENAMED.get(name, name)


def _log_before_saving(args: TrainingArguments, control: TrainerControl) -> TrainerControl:
    if (control.should_save or control.should_evaluate) and args.logging_strategy != "no":
        control.should_log = True
    return control


def _counted_before(run: RunDirectory) -> tuple[int, float]:
    rows = [row for row in run.metrics.rows() if row.get("split") == "train"]
    tokens = next((row["num_tokens"] for row in reversed(rows) if row.get("num_tokens")), 0)
    return int(tokens), float(next((row["elapsed_s"] for row in reversed(rows) if row.get("elapsed_s")), 0.0))


class _TokenMeter:
    """Sums the tokens of the training forward passes of a model, on its device, by a hook."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._counted = 0
        self._on_device: torch.Tensor | None = None
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            seen = mask.detach().sum(dtype=torch.int64)
            self._on_device = seen if self._on_device is None else self._on_device + seen
        elif isinstance(ids, torch.Tensor):
            self._counted += ids.numel()

    def total(self, device: torch.device) -> torch.Tensor:
        """Tokens of this process, as a tensor on `device`."""
        total = torch.tensor(self._counted, dtype=torch.int64, device=device)
        return total if self._on_device is None else total + self._on_device.to(device)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
