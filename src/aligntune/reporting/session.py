"""How does one session of a run get recorded from start to end? Directory, sinks, outcome and page in one `with`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.reporting.console import open_console
from aligntune.reporting.events import Recorder, Sink, TrailSink
from aligntune.reporting.page import write_report
from aligntune.reporting.run import RunDirectory
from aligntune.reporting.sinks import check_loggers, open_loggers

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def recording(
    output_dir: str | Path,
    *,
    rank: int = 0,
    loggers: str | Sequence[str] = (),
    loggers_explicit: bool = True,
    run_name: str | None = None,
    project: str = "aligntune",
    config: Mapping[str, Any] | None = None,
    log_level: str = "INFO",
    title: str = "train",
    resume: str | Path | int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Iterator[tuple[RunDirectory, Recorder]]:
    """Yield the run directory and its recorder; on leaving, close the sinks, record the outcome and write the page.

    Ranks other than 0 get a recorder that records nothing, and touch no file. `resume` and `overwrite` as in
    `RunDirectory.create`; `loggers` and `loggers_explicit` as in `open_loggers`, whose errors come before anything is
    written. An error inside the block is recorded as the outcome and passes through.
    """
    if rank != 0:
        yield RunDirectory(output_dir), Recorder()
        return
    check_loggers(loggers, explicit=loggers_explicit)
    screen = open_console(log_level, title=title, console=console)
    try:
        run = RunDirectory.create(output_dir, resume=resume, overwrite=overwrite)
        try:
            with run.session():
                sinks: list[Sink] = [TrailSink(run), screen]
                sinks += open_loggers(
                    loggers, explicit=loggers_explicit, run=run, run_name=run_name, project=project, config=config
                )
                recorder = Recorder(sinks, step=run.resumed_from)
                try:
                    yield run, recorder
                finally:
                    recorder.close()
        finally:
            if run.read_status():
                write_report(run)
    finally:
        screen.close()
