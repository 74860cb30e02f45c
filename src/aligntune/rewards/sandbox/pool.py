"""How are many jobs run at once? A pool of fork servers, one job each at a time, used from as many threads."""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO, Any, Self, TypeVar

from aligntune.errors import AlignTuneError, ConfigError, RewardError

from . import scratch
from .guest import wire
from .jobs import Check, Output, Program, Status, Verdict
from .limits import Isolation, Limits, cores
from .slot import Slot

POLL_S = 0.05
START_S = 30.0
Result = TypeVar("Result")


class Sandbox:
    """Runs model-written Python where it can do no harm.

    `isolation` is the least that must hold ("strict", "standard", "minimal"; see `limits.LEVELS`): the strongest that
    the kernel offers is always applied, and less than asked is a `ConfigError` at construction. `workers` jobs run at
    once (default: one a core). `preload` names modules that every job finds already imported. `without` leaves
    layers out ("seccomp", "landlock", "namespace"), which is how the tests reach the weaker levels.
    """

    def __init__(
        self,
        isolation: str = "standard",
        *,
        workers: int | None = None,
        preload: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError("the sandbox for code needs Linux or another Unix; run the training there")
        self.workers = workers or cores()
        self._make: Callable[[], Slot] = lambda: Slot(tuple(without), tuple(preload))
        self._slots: queue.LifoQueue[Slot | None] = queue.LifoQueue()
        first = self._make()
        try:
            self.isolation: Isolation = first.isolation()
            self.isolation.require(isolation)
        except AlignTuneError:
            first.close()
            raise
        for _ in range(self.workers - 1):
            self._slots.put(None)
        self._slots.put(first)
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="aligntune-sandbox")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every fork server."""
        self._threads.shutdown()
        while True:
            try:
                slot = self._slots.get_nowait()
            except queue.Empty:
                return
            if slot is not None:
                slot.close()

    def check(self, job: Check) -> Verdict:
        """Run the tests against the code."""
        with self._slot() as slot, _folder(slot) as folder:
            return _check(slot, job, folder)

    def run(self, job: Program) -> Output:
        """Run the program."""
        with self._slot() as slot, _folder(slot) as folder:
            return _run(slot, job, folder)

    def check_all(self, jobs: Sequence[Check]) -> list[Verdict]:
        """`check` for each, as many at once as there are workers."""
        return self._map(self.check, jobs)

    def run_all(self, jobs: Sequence[Program]) -> list[Output]:
        """`run` for each, as many at once as there are workers."""
        return self._map(self.run, jobs)

    def _map(self, function: Callable[[Any], Result], jobs: Sequence[Any]) -> list[Result]:
        if len(jobs) == 1:
            return [function(jobs[0])]
        return list(self._threads.map(function, jobs))

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        slot = self._slots.get()
        try:
            slot = slot or self._make()
            yield slot
        except BaseException:  # whatever went wrong, this fork server's state is unknown: the next job gets a new one
            if slot is not None:
                slot.close()
            slot = None
            raise
        finally:
            self._slots.put(slot)


@contextmanager
def _folder(slot: Slot) -> Iterator[str]:
    folder = scratch.fresh(slot.root)
    try:
        yield folder
    finally:
        scratch.remove(folder)


class _Watch:
    """Waits for a descriptor to become readable while time and disk last."""

    def __init__(self, descriptor: int, limits: Limits, folder: str) -> None:
        self.poll = select.poll()
        self.poll.register(descriptor, select.POLLIN)
        self.limits, self.folder = limits, folder
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def readable(self) -> Status:
        """ "ok" when there is something to read, else why the job has to end."""
        while True:
            left = self.limits.wall_s - self.seconds
            if left <= 0:
                return "timeout"
            if self.poll.poll(1000 * min(left, POLL_S)):
                return "ok"
            if scratch.over(self.folder, self.limits.scratch_mb << 20, self.limits.scratch_files):
                return "disk"


def _check(slot: Slot, job: Check, folder: str) -> Verdict:
    code_end, test_end = socket.socketpair()
    ours, theirs = socket.socketpair()
    with ours, test_end:
        with code_end, theirs, open(os.devnull, "r+b") as null:
            streams = [null.fileno()] * 3
            code = slot.spawn("solution", [*streams, code_end.fileno()], job.limits, folder)
            tests = slot.spawn("tests", [*streams, test_end.fileno(), theirs.fileno()], job.limits, folder)
        start(test_end, {"code": job.code})  # the tests own this end, and are given the job only after it
        start(ours, _tests_of(job))
        test_end.close()
        watch = _Watch(ours.fileno(), job.limits, folder)
        frames, status = _frames(ours, watch)
    code_ended, _ = slot.reap([code, tests])
    return _verdict(job, frames, status, code_ended, watch.seconds)


def start(channel: socket.socket, job: dict[str, Any]) -> None:
    """Give a fresh child its job once it has said that it is confined."""
    first = {"why": f"it said nothing for {START_S} s"}
    try:
        if select.select([channel], [], [], START_S)[0]:
            first = wire.receive(channel.fileno())
        if first.get("confined"):
            wire.send(channel.fileno(), job)
            return
    except wire.ProtocolError as error:
        first = {"why": str(error)}
    raise RewardError(f"the sandbox could not confine a process, so it ran nothing: {first['why']}")


def _tests_of(job: Check) -> dict[str, Any]:
    keys = ("tests", "kind", "setup", "entry_point", "names", "module", "in_place")
    return {key: getattr(job, key) for key in keys}


def _frames(channel: socket.socket, watch: _Watch) -> tuple[list[dict[str, Any]], Status]:
    """What the tests reported until they ended, were cut off, or died."""
    frames: list[dict[str, Any]] = []
    while True:
        status = watch.readable()
        if status != "ok":
            return frames, status
        try:
            frame = wire.receive(channel.fileno())
        except wire.ProtocolError:
            return frames, "killed"
        frames.append(frame)
        if "ended" in frame or "broken" in frame:
            return frames, "ok"


def _verdict(
    job: Check, frames: list[dict[str, Any]], status: Status, code_ended: dict[str, Any], seconds: float
) -> Verdict:
    tests = [frame for frame in frames if "test" in frame]
    last = frames[-1] if frames else {}
    total = len(job.tests) if job.kind == "statements" else 1 if job.kind == "check" else len(job.names or ())
    if job.kind == "functions" and job.names is None:
        total = last["ended"] if last.get("ended") else len(tests) + 1
    reason = last.get("failure", "")
    if status == "timeout":
        reason = f"no verdict within {job.limits.wall_s} s"
    elif status == "disk":
        reason = f"more than {job.limits.scratch_mb} MB or {job.limits.scratch_files} files in the scratch folder"
    elif code_ended["signal"] and not code_ended["killed"]:
        status, reason = "killed", f"the code's process died of signal {code_ended['signal']}"
    return Verdict(
        status=status,
        names=tuple(frame["test"] for frame in tests),
        failures=tuple(frame["failure"] for frame in tests),
        total=max(total, len(tests)),
        reason=reason,
        broken=last.get("broken", ""),
        seconds=seconds,
    )


def _run(slot: Slot, job: Program, folder: str) -> Output:
    ours, theirs = socket.socketpair()
    with TemporaryFile() as stdin, TemporaryFile() as stdout, TemporaryFile() as stderr, ours:
        stdin.write(job.stdin.encode("utf-8", "surrogatepass"))
        stdin.flush()
        stdin.seek(0)
        with theirs:
            streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
            pid = slot.spawn("script", [*streams, theirs.fileno()], job.limits, folder)
        start(ours, {"code": job.code})
        watch = _Watch(ours.fileno(), job.limits, folder)
        status = watch.readable()
        (ended,) = slot.reap([pid], grace_s=0.2 if status == "ok" else 0.0)
        if status == "ok" and ended["signal"]:
            status = "killed"
        elif status == "ok" and ended["exit"]:
            status = "error"
        keep = job.limits.output_kb << 10
        return Output(status, _text(stdout, keep), _text(stderr, keep), ended["exit"], watch.seconds)


def _text(stream: IO[bytes], keep: int) -> str:
    stream.seek(0)
    return stream.read(keep).decode("utf-8", errors="replace")


_shared: dict[tuple[int, str], Sandbox] = {}
_lock = threading.Lock()


def shared(isolation: str = "standard") -> Sandbox:
    """This process's sandbox of that level, started at the first call and ended with the process."""
    key = (os.getpid(), isolation)
    with _lock:
        if key not in _shared:
            _shared[key] = Sandbox(isolation)
        return _shared[key]
