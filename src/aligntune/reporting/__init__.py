"""What does a run leave behind? Files that can be trusted, a line or a bar while it runs, and one page at the end.

    with recording("output", loggers=["tensorboard"], config=resolved) as (run, recorder):
        run.write_text("config.yaml", text)
        run.write_json("provenance.json", provenance.collect(...))
        recorder.metrics(10, {"loss": 1.2})

`write_report(folder)` builds `report.html` again at any time, from the files alone.
"""

from aligntune.reporting.events import Recorder, Sink
from aligntune.reporting.page import write_report
from aligntune.reporting.run import RunDirectory
from aligntune.reporting.session import recording

__all__ = ["Recorder", "RunDirectory", "Sink", "recording", "write_report"]
