"""What does a person see while it runs? A live bar on a terminal, one plain line per log anywhere else.

This and `cli` are the only places that write to the terminal. Warnings of the package's own loggers pass through here
too, so that they do not tear the bar.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from aligntune.errors import ConfigError
from aligntune.reporting.events import Sink
from aligntune.reporting.text import duration, is_timing, label, metric

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}

SHOWN = {
    "epoch": "epoch",
    "loss": "loss",
    "reward": "reward",
    "accuracy": "accuracy",
    "mean_token_accuracy": "token acc",
    "kl": "kl",
    "completions/mean_length": "length",
    "learning_rate": "lr",
    "grad_norm": "grad",
    "tokens_per_second": "tok/s",
    "memory_gib": "mem",
}
"""What a training line shows, in this order; the rest is in metrics.jsonl and on the page."""

MAIN = ("train", "evolution")
"""Phases that move the bar; an evolution's unit is one training of a candidate."""


def open_console(
    level: str = "INFO", *, title: str = "train", stream: TextIO | None = None, console: Console | None = None
) -> Sink:
    """The console of this process: live if `stream` (stdout) is a terminal, else plain lines without escape codes.

    `console` gives a rich console to draw on, whatever the stream is. Raises `ConfigError` for an unknown level.
    """
    if level.upper() not in LEVELS:
        raise ConfigError(f"unknown log_level '{level}': choose from {', '.join(LEVELS)}")
    threshold = LEVELS[level.upper()]
    out = stream or sys.stdout
    if console is None and not out.isatty():
        return PlainConsole(threshold, out)
    from rich.console import Console

    console = console or Console(file=out)
    if not console.is_terminal or console.is_dumb_terminal:
        return PlainConsole(threshold, out)
    return LiveConsole(threshold, console, title)


class ConsoleSink(Sink):
    """What both consoles share: the level, the clock, the time left, and the package's log messages."""

    name = "console"

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.done, self.total, self.phase = 0, 0, "train"
        self._first_step: int | None = None
        self._first_time = time.monotonic()
        self._handler = _LogHandler(self)
        logger = logging.getLogger("aligntune")
        self._earlier = (logger.level, logger.propagate)
        logger.addHandler(self._handler)
        logger.setLevel(threshold)
        logger.propagate = False

    def note(self, step: int, message: str, level: str) -> None:
        if (logging.WARNING if level == "warning" else logging.INFO) >= self.threshold:
            self.message(message, level)

    def progress(self, step: int, total: int | None, phase: str) -> None:
        if phase in MAIN:
            if self._first_step is None or phase != self.phase:
                self._first_step, self._first_time, self.phase = step, time.monotonic(), phase
            self.done, self.total = step, total or 0

    def seconds_left(self) -> float | None:
        """From the pace of this session; None before the first step and without a known end."""
        if self._first_step is None or self.done <= self._first_step or not self.total:
            return None
        pace = (time.monotonic() - self._first_time) / (self.done - self._first_step)
        return pace * max(0, self.total - self.done)

    def message(self, text: str, level: str) -> None:
        """Show one message; `level` is info, warning or error."""
        raise NotImplementedError

    def close(self, failed: bool = False) -> None:
        logger = logging.getLogger("aligntune")
        logger.removeHandler(self._handler)
        logger.level, logger.propagate = self._earlier


class PlainConsole(ConsoleSink):
    """One line per log: for files, CI and pipes."""

    def __init__(self, threshold: int, stream: TextIO) -> None:
        self._stream = stream
        super().__init__(threshold)

    def metrics(self, step: int, values: Mapping[str, Any], split: str) -> None:
        if self.threshold > logging.INFO:
            return
        where = f"step {step}/{self.total}" if self.total and split == "train" else f"step {step}"
        parts = [where if split == "train" else f"{split} at {where}"]
        parts += [f"{name} {value}" for name, value in shown_values(values, split)]
        left = self.seconds_left()
        if split == "train" and left is not None:
            parts.append(f"left {duration(left)}")
        self._line("  ".join(parts))

    def message(self, text: str, level: str) -> None:
        self._line(text if level == "info" else f"{level}: {text}")

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveConsole(ConsoleSink):
    """A bar with the newest numbers under it; evaluations and messages scroll by above."""

    def __init__(self, threshold: int, console: Console, title: str) -> None:
        from rich.live import Live

        self._console = console
        self._title = title
        self._values: Mapping[str, Any] = {}
        self._split = "train"
        self._part: tuple[str, int, int | None] | None = None
        self._started = False
        super().__init__(threshold)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def metrics(self, step: int, values: Mapping[str, Any], split: str) -> None:
        if split == "train" or (split == "evolution" and self.phase == split):
            self._values, self._split = values, split
        elif self.threshold <= logging.INFO:
            self._part = None
            numbers = "   ".join(f"[dim]{name}[/] {value}" for name, value in shown_values(values, split))
            self._console.print(f"[bold cyan]{split}[/] [dim]step[/] {step}   {numbers}", highlight=False)

    def progress(self, step: int, total: int | None, phase: str) -> None:
        super().progress(step, total, phase)
        self._part = None if phase in MAIN else (phase, step, total)
        if not self._started and self.threshold <= logging.INFO:
            self._started = True
            self._live.start()

    def message(self, text: str, level: str) -> None:
        from rich.text import Text

        style = {"info": "dim", "warning": "yellow", "error": "bold red"}[level]
        self._console.print(Text(text if level == "info" else f"{level}: {text}", style=style))

    def close(self, failed: bool = False) -> None:
        if self._started:
            self._part = None
            self._live.stop()
        super().close()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.seconds_left()
        spent = duration(time.monotonic() - self._first_time)
        bar = Table.grid(padding=(0, 2), expand=False)
        count = f"{self.done}/{self.total}  {self.done / self.total:.0%}" if self.total else str(self.done)
        bar.add_row(
            Text(self._title if self.phase == "train" else f"{self._title}: {self.phase}", style="bold"),
            ProgressBar(total=self.total or None, completed=self.done, width=32, pulse=not self.total),
            Text(count),
            Text(spent if left is None else f"{spent}, {duration(left)} left", style="dim"),
        )
        line = Text("  ")
        for name, value in shown_values(self._values, self._split):  # hard spaces: a name stays with its number
            line.append(f"{name} ".replace(" ", "\u00a0"), style="dim").append(value.replace(" ", "\u00a0") + "   ")
        if self._part is not None:
            phase, step, total = self._part
            line.append(f"{phase} {step}/{total}" if total else f"{phase} {step}", style="cyan")
        return Group(bar, line)


def shown_values(values: Mapping[str, Any], split: str) -> list[tuple[str, str]]:
    """Name and text of what a log line shows: for training the names of `SHOWN`, else all but timings, at most 12."""
    if split == "train":
        names = [name for name in SHOWN if name in values]
    else:
        names = [name for name in values if not is_timing(name) and name != "epoch"][:12]
    found = []
    for name in names:
        value = values[name]
        if isinstance(value, (int, float)):
            text = metric(name, value, digits=4 if split != "train" or name == "loss" else 3)
            found.append((SHOWN.get(name, label(name).lower()), text.removesuffix("/s")))
    return found


class _LogHandler(logging.Handler):
    def __init__(self, sink: ConsoleSink) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= 40 else "warning" if record.levelno >= 30 else "info"
        self._sink.message(record.getMessage(), level)
