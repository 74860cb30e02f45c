"""With which random numbers does a run go on that has another number of processes than before?

Each process has a random state of its own (dropout draws from it), in a file of its own in a checkpoint. The first process
goes on from that of the first before; processes that are new begin at the seed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

ALONE, FIRST = "rng_state.pth", "rng_state_0.pth"
"""The first process's file: of a run of one process, and of one of several."""


def read_any_random_state(trainer: Any) -> None:
    """Make the first process of `trainer` read the other of the two files where its own is not there."""
    own, other = (ALONE, FIRST) if trainer.args.world_size == 1 else (FIRST, ALONE)
    read_own = trainer._load_rng_state

    def load(checkpoint: str | None) -> None:
        folder = Path(checkpoint or ".")
        if trainer.args.process_index != 0 or (folder / own).exists() or not (folder / other).exists():
            read_own(checkpoint)
        else:
            set_random_state(folder / other)

    trainer._load_rng_state = load


def set_random_state(file: Path) -> None:
    """Set the generators of Python, numpy and torch to a state that a Trainer wrote."""
    with safe_globals():
        state = torch.load(file, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:  # of the current device, or of all that the process saw
        torch.cuda.set_rng_state(state["cuda"] if torch.is_tensor(state["cuda"]) else state["cuda"][0])
