"""What can be run in a sandbox, and what comes back? Jobs and results, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .limits import Limits

Status = Literal["ok", "error", "timeout", "killed", "disk"]


@dataclass(frozen=True)
class Check:
    """Code to be judged by tests that it never sees.

    `kind`: "statements" (each of `tests` is one test), "check" (`tests` define `check(candidate)`, as HumanEval) or
    "functions" (`tests` define `test_*` functions or unittest classes; `names` chooses among them). `setup` is trusted
    code for the tests' side; classes it defines that the code defines too are passed by value. Arguments are copies:
    with `in_place` the changes that the code makes to a list, dict, set or bytearray come back to the test.
    `module` is the name under which tests may import the code.
    """

    code: str
    tests: tuple[str, ...]
    kind: Literal["statements", "check", "functions"] = "statements"
    setup: str = ""
    entry_point: str | None = None
    names: tuple[str, ...] | None = None
    module: str = "solution"
    in_place: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Verdict:
    """`failures` has an entry a test that ran: '' where it passed. `total` counts those that never ran, too.

    `status` is "ok" when every test was run to its end; `broken` is set when the tests themselves are not valid.
    """

    status: Status
    names: tuple[str, ...]
    failures: tuple[str, ...]
    total: int
    reason: str = ""
    broken: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> int:
        return sum(not failure for failure in self.failures)

    @property
    def fraction(self) -> float:
        """Share of the tests that passed, 0 when there were none to run."""
        return self.passed / self.total if self.total else 0.0


@dataclass(frozen=True)
class Program:
    """A whole program: `stdin` is its input."""

    code: str
    stdin: str = ""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Output:
    """How a program ended and what it printed, each stream cut at `Limits.output_kb`."""

    status: Status
    stdout: str
    stderr: str
    exit_code: int | None
    seconds: float = 0.0
