"""How does a trainer start: from nothing, from a checkpoint, or from a run that was already through?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerState

from aligntune.trainers.layouts import read_any_layout, read_weights
from aligntune.trainers.random_state import read_any_random_state


def fit(trainer: Any, checkpoint: Path | None) -> None:
    """Train from the start or a checkpoint; one that already has all steps is only read (a Trainer would add a step)."""
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if checkpoint is not None and state is not None and 0 < state.max_steps <= state.global_step:
        read_weights(trainer.model, Path(state.best_model_checkpoint or checkpoint))
        trainer.state = state
        return
    if checkpoint is not None:
        read_any_layout(trainer, checkpoint)
        read_any_random_state(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
