"""How does a trainer start: from nothing, from a checkpoint, or from a run that was already through?"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerState

from aligntune.errors import AlignTuneError, ConfigError
from aligntune.trainers.keeping import EarlyStopping, evaluations_without_gain
from aligntune.trainers.layouts import layout_in, read_any_layout, read_weights
from aligntune.trainers.random_state import read_any_random_state

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
PICKLED = (".pt", ".pth", ".bin")


def check_whole(checkpoint: Path) -> None:
    """Raises `ConfigError` that names a file of `checkpoint` that is missing, damaged or cut off (a disk that was full, say)."""
    other = "resume from another checkpoint of the run"
    if not (checkpoint / STATE).exists():
        raise ConfigError(f"{checkpoint} holds no {STATE}, so it is not a checkpoint to resume from; {other}")
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    continue
            whole = file.suffix not in PICKLED or zipfile.is_zipfile(file)
        except SafetensorError:
            whole = False
        if not whole:
            raise ConfigError(f"{file} is damaged or cut off; {other}")


def other_rows(before: Path, now: Mapping[str, Any]) -> list[str]:
    """Why the rows that come next are not those that the resumed run would have had: its provenance is in the file `before`, ours is `now`.

    The place in the data is a number of steps: of other rows, or in steps of another size, it is another place.
    """
    try:
        then = json.loads(before.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found = []
    (was, fingerprints), (rows, others) = (_training_rows(facts) for facts in (then, now))
    if None not in (*fingerprints, *others) and fingerprints != others:
        found.append(f"the training rows are not those of the run that is resumed ({was:,} then, {rows:,} now)")
    if "rows_per_step" in then and then["rows_per_step"] != now["rows_per_step"]:
        found.append(
            f"a step of the run that is resumed had {then['rows_per_step']} rows, and has {now['rows_per_step']} now"
        )
    return [f"{each}: it goes on at the same step, which is another place in the data" for each in found]


def _training_rows(facts: Mapping[str, Any]) -> tuple[int, list[str | None]]:
    """(rows, fingerprints) of the datasets that are trained on."""
    sets = [entry for entry in facts.get("data", ()) if entry["role"] == "train"]
    return sum(entry["rows"] or 0 for entry in sets), [entry["fingerprint"] for entry in sets]


def fit(trainer: Any, checkpoint: Path | None) -> None:
    """Train from the start or a checkpoint; one that already has all steps is only read (a Trainer would add a step)."""
    if checkpoint is None:
        trainer.train()
        return
    check_whole(checkpoint)
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    where = _BestCheckpoint(checkpoint, state.best_model_checkpoint)
    where.correct(state)
    if _is_through(trainer, state):
        logger.info("%s has all steps of this run: nothing is left to train", checkpoint.name)
        best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        read_weights(trainer.model, Path(best or checkpoint))
        trainer.state = state
        return
    if not trainer.is_deepspeed_enabled and layout_in(checkpoint) is None:
        raise ConfigError(
            f"{checkpoint}: holds no state of the optimiser, without which a run cannot go on; resume from another checkpoint"
        )
    read_any_layout(trainer, checkpoint)
    read_any_random_state(trainer)
    if not trainer.is_deepspeed_enabled:
        trainer._load_optimizer_and_scheduler = partial(_read_optimizer, trainer, trainer._load_optimizer_and_scheduler)
    trainer.add_callback(where)
    trainer.args.eval_on_start = False  # these weights were evaluated when they were saved
    trainer.train(resume_from_checkpoint=str(checkpoint))


def _is_through(trainer: Any, state: TrainerState) -> bool:
    """Whether nothing is left to do by this run's own settings, which may be others than those of the run that was saved."""
    patience = [
        each.early_stopping_patience for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStopping)
    ]
    if patience and evaluations_without_gain(state) >= patience[0]:
        return True
    steps = trainer.args.max_steps
    if steps <= 0:
        steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return 0 < steps <= state.global_step


def _read_optimizer(trainer: Any, read: Any, checkpoint: str | None) -> None:
    """`read`, with errors that say which setting differs from those of the run that was saved."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    own = {name for group in optimizer.param_groups for name in group}
    try:
        read(checkpoint)
    except ValueError as error:
        if isinstance(error, AlignTuneError):
            raise
        raise ConfigError(
            f"{checkpoint}: its run trained other weights than this one ({error}); resume it with the same model and LoRA settings"
        ) from error
    if any(own - set(group) for group in optimizer.param_groups):
        raise ConfigError(
            f"{checkpoint}: its run had another optimizer than this one; resume it with the same train.optimizer"
        )


class _BestCheckpoint(TrainerCallback):
    """Where the best evaluation's weights are now: a checkpoint names the folder they were written to, and runs are moved or
    copied, after which that folder may hold those of another run."""

    def __init__(self, checkpoint: Path, written: str | None) -> None:
        self.checkpoints, self.written = checkpoint.parent, written

    def correct(self, state: TrainerState) -> None:
        """Name it in `state`; if it is gone, the best evaluation is looked for from here on."""
        if self.written is None:
            return
        written = Path(self.written)
        found = next((folder for folder in (self.checkpoints / written.name, written) if folder.is_dir()), None)
        if found is None:
            logger.warning("%s, the best evaluation's checkpoint, is gone: the best is sought anew", written)
            state.best_metric = state.best_global_step = None
        state.best_model_checkpoint = None if found is None else str(found)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.correct(state)
