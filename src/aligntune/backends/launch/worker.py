"""`python -m aligntune.backends.launch.worker JOB.json`: runs a session that another process described."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from aligntune.backends.launch.job import Job
from aligntune.backends.launch.supervise import STARTER
from aligntune.errors import AlignTuneError
from aligntune.stopping import end_with
from aligntune.trainers.ranks import is_main_process, rank


def main(backend: Any = None) -> int:
    """Train what `sys.argv[1]` says, on `backend` if given; report the result or the error beside it; the exit code."""
    job = Job(Path(sys.argv[1]).parent)
    if STARTER in os.environ:
        end_with(int(os.environ[STARTER]))
    try:
        train(job, backend)
    except KeyboardInterrupt as stop:
        job.write_error(rank(), stop)
        return 130
    except Exception as error:  # noqa: BLE001  (the boundary of the process: reported to the one that started it)
        job.write_error(rank(), error)
        return 2 if isinstance(error, AlignTuneError) else 1
    return 0


def train(job: Job, backend: Any = None) -> None:
    """Run the session of `job` in this process."""
    from aligntune.api import session_class
    from aligntune.backends.select import backends
    from aligntune.config.enums import BackendType
    from aligntune.config.resolve import resolve
    from aligntune.trainers.parallel import use_own_device

    use_own_device()
    told = job.read()
    resolved = resolve(told["config"])
    chosen = backend if backend is not None else backends()[BackendType(told["backend"])]
    session = session_class(resolved)(resolved, chosen, told["reasons"])
    metrics = session.train(**told["arguments"])
    if is_main_process():
        job.write_result({"metrics": metrics})


if __name__ == "__main__":
    raise SystemExit(main())
