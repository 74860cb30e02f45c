"""`python -m aligntune.backends.launch.starter MODULE ...`: runs torchrun or accelerate so that an error of the run is not lost in theirs.

When a rank ends badly they log it and raise a traceback of their own. Where the rank has told its error, which the process
that started the run shows, that is left out; where it could not (it was killed), their account of it stays, without traceback.
"""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from aligntune.backends.launch.job import Job


def main() -> int:
    """Run the module `sys.argv[1]` with the arguments after it, the last of which is the job; the exit code."""
    import torch.distributed.elastic.multiprocessing.api as ranks

    logging.getLogger(ranks.__name__).setLevel(logging.CRITICAL)
    job = Job(Path(sys.argv[-1]).parent)
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except ChildFailedError as failed:
        if job.first_error() is None:
            sys.stderr.write(f"{failed}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
