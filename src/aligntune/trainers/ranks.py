"""Which process is this? Known from the launcher's environment, before torch.distributed starts."""

from __future__ import annotations

import os


def rank() -> int:
    """Rank of this process among all of the run; 0 for a run of one process."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """True on the one process that writes files."""
    return rank() == 0


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))
