"""Who is left when the process that started a run is stopped or killed? Nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aligntune.cli import main as cli
from aligntune.stopping import told_to_stop

WORKER = """
import os, signal, sys, time
from pathlib import Path
from aligntune.backends.launch.supervise import STARTER
from aligntune.stopping import end_with

folder = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
end_with(int(os.environ[STARTER]))
(folder / "worker").write_text(str(os.getpid()))
try:
    time.sleep(100)
except KeyboardInterrupt:
    (folder / "heard").touch()
"""
STARTING = """
import signal, sys
from aligntune.backends.launch.supervise import Processes
from aligntune.stopping import told_to_stop

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
with told_to_stop(), Processes({"here": [sys.executable, *sys.argv[1:]]}, {}) as processes:
    raise SystemExit(processes.wait())
"""


@pytest.fixture
def started(tmp_path: Path) -> Callable[[], tuple[subprocess.Popen[bytes], int]]:
    """A process that supervises a worker, and the worker's id."""

    def start() -> tuple[subprocess.Popen[bytes], int]:
        for name, text in (("worker.py", WORKER), ("starting.py", STARTING)):
            (tmp_path / name).write_text(text)
        starter = subprocess.Popen(
            [sys.executable, tmp_path / "starting.py", tmp_path / "worker.py", tmp_path],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        said = tmp_path / "worker"
        assert within(60, lambda: said.exists() and said.read_text() != "")
        return starter, int(said.read_text())

    return start


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody reaps it here


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGHUP])
def test_a_starter_that_is_told_to_stop_stops_its_processes_as_by_ctrl_c(
    started: Callable[[], tuple[subprocess.Popen[bytes], int]], tmp_path: Path, told: signal.Signals
) -> None:
    starter, worker = started()
    starter.send_signal(told)
    assert starter.wait(30) == 128 + told
    assert (tmp_path / "heard").exists()
    assert is_gone(worker)


def test_a_process_does_not_outlive_a_starter_that_was_killed(
    started: Callable[[], tuple[subprocess.Popen[bytes], int]],
) -> None:
    starter, worker = started()
    starter.kill()
    starter.wait()
    assert within(30, lambda: is_gone(worker))


@pytest.fixture
def plain_signals() -> Iterator[None]:
    """SIGTERM is ignored and SIGHUP is not, however these tests were started."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGHUP, before[1])


def stopped(by: signal.Signals) -> None:
    os.kill(os.getpid(), by)
    time.sleep(0.2)


@pytest.mark.usefixtures("plain_signals")
def test_signals_that_are_treated_otherwise_stay_so() -> None:
    with told_to_stop():
        stopped(signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            stopped(signal.SIGHUP)
    assert end.value.code == 128 + signal.SIGHUP
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.usefixtures("plain_signals")
def test_the_command_ends_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_register", lambda: None)
    monkeypatch.setattr(cli, "app", lambda: stopped(signal.SIGHUP))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 128 + signal.SIGHUP
