"""How can model-written code be run and judged without trusting it?

`Sandbox.check` runs tests against code in two processes: the one with the code never sees the tests, and the verdict
comes from the other. `Sandbox.run` runs a program on an input. `isolation()` says what holds on this machine.

What it does not protect from: a fault in the Linux kernel or in CPython's own memory safety that lets code leave its
process; timing and the metadata of files (`stat` works everywhere); tests that a wrong answer also passes.
"""

from .jobs import Check, Output, Program, Verdict
from .limits import LEVELS, Isolation, Limits
from .pool import Sandbox, shared

__all__ = ["LEVELS", "Check", "Isolation", "Limits", "Output", "Program", "Sandbox", "Verdict", "isolation", "shared"]


def isolation() -> Isolation:
    """What the sandbox can enforce here, found by trying it in a process of its own."""
    with Sandbox("minimal", workers=1) as sandbox:
        return sandbox.isolation
