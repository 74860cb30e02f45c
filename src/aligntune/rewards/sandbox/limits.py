"""How much may a piece of model-written code use, and how is it isolated?"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from aligntune.errors import ConfigError

LEVELS: dict[str, tuple[str, ...]] = {
    "strict": ("network", "writes", "processes", "reads"),
    "standard": ("network", "writes", "processes"),
    "minimal": (),
}
MEANING = {
    "network": "no socket to anything outside the process can be opened",
    "writes": "no file outside the scratch folder can be created, changed or removed",
    "processes": "no process or program can be started, and no other process signalled or traced",
    "reads": "only Python's installation, system libraries and the scratch folder can be read: no file of yours, and no "
    "other process's memory (which holds the tests)",
}


@dataclass(frozen=True)
class Limits:
    """What one job may use. The job is killed at `wall_s`; the rest is refused by the kernel.

    `memory_mb` is address space; `file_mb` the largest file, standard output included; `scratch_mb` the whole scratch
    folder, measured every 50 ms (a job that outruns the measurement is killed at the next); `output_kb` what is kept.
    """

    wall_s: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16
    scratch_mb: int = 64
    scratch_files: int = 1000
    open_files: int = 64
    output_kb: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"sandbox limit {name}={value}: it must be above 0")

    def for_kernel(self, *, cpu: bool = True) -> dict[str, int]:
        """The limits that the child sets on itself; CPU seconds follow the wall clock."""
        return {
            "cpu_s": math.ceil(self.wall_s) + 1 if cpu else 0,
            "memory_mb": self.memory_mb,
            "file_mb": self.file_mb,
            "open_files": self.open_files,
        }


@dataclass(frozen=True)
class Isolation:
    """What holds on this machine, found by trying. `str()` gives the statement that runs print and record."""

    guarantees: dict[str, bool]
    seccomp: bool
    landlock: int
    network_namespace: bool
    notes: dict[str, str]

    def __str__(self) -> str:
        parts = [
            "seccomp filter" if self.seccomp else "no seccomp filter",
            f"Landlock {self.landlock}" if self.landlock else "no Landlock",
            "own user and network namespace" if self.network_namespace else "no namespaces",
            "resource limits, process group, scratch folder, timeout",
        ]
        missing = [f"{name}: NOT held ({MEANING[name]})" for name, held in self.guarantees.items() if not held]
        held = ", ".join(name for name, value in self.guarantees.items() if value) or "none"
        return "; ".join([", ".join(parts), f"held: {held}", *missing])

    def require(self, level: str) -> None:
        """Raise `ConfigError` when a guarantee of `level` does not hold here."""
        if level not in LEVELS:
            raise ConfigError(f"isolation={level!r}: choose one of {', '.join(LEVELS)}")
        missing = [name for name in LEVELS[level] if not self.guarantees[name]]
        if missing:
            lines = "".join(f"\n  {name}: {MEANING[name]}" for name in missing)
            raise ConfigError(
                f"isolation={level!r} cannot be had on this machine. Not held:{lines}\n"
                f"In force: {self}\nRun where the kernel offers seccomp and Landlock (Linux 5.13 or later), or accept "
                f"less with isolation={_strongest(self)!r} if you trust the code that the model writes."
            )


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _strongest(isolation: Isolation) -> str:
    return next(level for level, names in LEVELS.items() if all(isolation.guarantees[name] for name in names))
