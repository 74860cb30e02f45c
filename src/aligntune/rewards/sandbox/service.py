"""How is a slow library called on untrusted text without waiting for ever? In a confined process that is kept.

Unlike the code of a job, the function is ours; what it is called with is not. A call that outlasts its time is
answered by killing the process, and the next call gets a new one from the same warm fork server.
"""

from __future__ import annotations

import os
import queue
import select
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aligntune.errors import RewardError

from .guest import wire
from .limits import Limits, cores
from .pool import start
from .slot import Slot


class TimedOut(Exception):
    """The call took longer than it may, or its process died (out of memory)."""


class Service:
    """`function` ("module:name", of the guest folder or an installed package) in `workers` confined processes.

    `preload` names the modules to import once, before the processes are forked.
    """

    def __init__(self, function: str, preload: Sequence[str], limits: Limits, workers: int | None = None) -> None:
        self.function, self.limits = function, limits
        self.workers = workers or cores()
        self._idle: queue.LifoQueue[_Helper | None] = queue.LifoQueue()
        self._preload = tuple(preload)
        for _ in range(self.workers):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="aligntune-service")

    def call(self, arguments: Mapping[str, Any]) -> Any:
        """The function's result. Raises `TimedOut`, or `RewardError` with what the function raised."""
        helper = self._idle.get()
        try:
            helper = helper or _Helper(self.function, self._preload, self.limits)
            return helper.call(arguments)
        finally:
            self._idle.put(helper)

    def call_all(self, calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Results in order; a call that timed out or failed has its exception in its place."""

        def one(arguments: Mapping[str, Any]) -> Any:
            try:
                return self.call(arguments)
            except (TimedOut, RewardError) as error:
                return error

        return [one(calls[0])] if len(calls) == 1 else list(self._threads.map(one, calls))

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown()
        for _ in range(self.workers):
            helper = self._idle.get()
            if helper is not None:
                helper.slot.close()


class _Helper:
    """One fork server with one child that answers calls."""

    def __init__(self, function: str, preload: tuple[str, ...], limits: Limits) -> None:
        self.slot = Slot(preload=preload)
        self.function, self.limits = function, limits
        self.pid, self.channel = self._spawn()

    def _spawn(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull, "r+b") as null:
            streams = [null.fileno()] * 3
            pid = self.slot.spawn("service", [*streams, theirs.fileno()], self.limits, self.slot.root, cpu=False)
        start(ours, {"function": self.function})
        return pid, ours

    def call(self, arguments: Mapping[str, Any]) -> Any:
        try:
            wire.send(self.channel.fileno(), dict(arguments))
            ready, _, _ = select.select([self.channel], [], [], self.limits.wall_s)
            answer = wire.receive(self.channel.fileno()) if ready else None
        except wire.ProtocolError:
            answer = None
        if answer is None:
            self.slot.reap([self.pid])
            self.channel.close()
            self.pid, self.channel = self._spawn()
            raise TimedOut(f"no result within {self.limits.wall_s} s and {self.limits.memory_mb} MB")
        if "raises" in answer:
            raise RewardError(answer["raises"])
        return answer["gives"]
