"""Which backend runs this config, and why not the others?"""

from __future__ import annotations

import logging

from aligntune.backends.base import Backend, Run
from aligntune.config.applies import ONLINE
from aligntune.config.enums import BackendType
from aligntune.errors import BackendError

logger = logging.getLogger(__name__)


def backends() -> dict[BackendType, Backend]:
    """All backends, in the order in which `auto` asks them, but for `in_order`.

    Native stands before TRL because it trains the same losses (1e-5, tested) and was measured to be faster beside it. DPO: 2.6
    times the tokens a second at 0.6 of the memory (H100, `benchmarks/dpo_step.py`). SFT: 2.7 times, packed (one CPU core,
    `benchmarks/sft_run.py`). GRPO: a step in a third of the time (one CPU core, `benchmarks/grpo_run.py`).
    """
    from aligntune.backends.native import NativeBackend
    from aligntune.backends.trl import TRLBackend
    from aligntune.backends.unsloth import UnslothBackend

    return {
        BackendType.UNSLOTH: UnslothBackend(),
        BackendType.NATIVE: NativeBackend(),
        BackendType.TRL: TRLBackend(),
    }


def in_order(run: Run) -> list[Backend]:
    """As `auto` asks them. Unsloth is the last for online algorithms: its rollouts are those of `generate`, 4k tokens/s where our
    engine makes 61k (128 rows, 0.5B shape on an H100, `benchmarks/rollouts.py`)."""
    found = list(backends().values())
    return sorted(found, key=lambda backend: backend.name == "unsloth") if run.algorithm in ONLINE else found


def choose(run: Run) -> tuple[Backend, list[str]]:
    """The backend that runs `run`, and the reasons of those that were asked before it.

    A named backend is asked first; when it refuses, the others follow in `auto`'s order, unless `fallback` is False.
    Raises `BackendError` with every reason when none can run it.
    """
    wanted = run.backend
    asked = in_order(run)
    if wanted is not BackendType.AUTO:
        asked = sorted(asked, key=lambda backend: backend.name != wanted.value)[: None if run.fallback else 1]
    reasons: list[str] = []
    for backend in asked:
        skipped = backend.name in run.skip_backends and backend.name != wanted.value
        reason = why_not(backend, run, skipped=skipped)
        if reason is None:
            if reasons and wanted is not BackendType.AUTO:
                logger.warning("backend %s: %s; using %s", wanted.value, reasons[0].partition(": ")[2], backend.name)
            return backend, reasons
        reasons.append(f"{backend.name}: {reason}")
    raise BackendError("no backend can run this config:\n" + "\n".join(f"  {reason}" for reason in reasons))


def why_not(backend: Backend, run: Run, *, skipped: bool = False) -> str | None:
    """Why `backend` does not run `run` here, or None."""
    return "is in skip_backends" if skipped else backend.can_run(run) or backend.available()
