"""Candidates in several processes. Each worker holds a session of its own, whose frozen weights are the starter's memory.

A worker is started once: it reads the model's files once, then lays the starter's tensors in place of the frozen weights
and copies the trained ones. A worker that dies fails the candidate it had, and another takes its place. Results do not
depend on which worker measured what; with as many threads as the starter they are the same to the bit.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, multiprocessing, nn

from aligntune.config.dump import plain_tree
from aligntune.config.resolve import resolve
from aligntune.errors import BackendError, ConfigError
from aligntune.stopping import end_with
from aligntune.trainers.candidates import Done, Jobs, Outcome

if TYPE_CHECKING:
    from aligntune.trainers.meta_es import MetaESSession

STARTS = 3
"""Deaths in a row after which workers are given up."""
GRACE = 5.0
"""Seconds that a worker has to end."""


class Workers:
    """`count` processes that measure candidates; close them at the end."""

    def __init__(self, session: MetaESSession, count: int) -> None:
        tree, lost = plain_tree(session.resolved)
        if lost:
            raise ConfigError(
                f"train.num_workers: is {count}, and another process cannot import {'; '.join(lost)}: move it to a module "
                "(or give 'file.py:function'), or set num_workers to 1"
            )
        self._session, self._tree = session, tree
        self._threads = max(1, torch.get_num_threads() // count)
        self._context = multiprocessing.get_context("spawn")
        self._weights = shared_weights(session.model)
        self._deaths = 0
        self._running: dict[Any, Any] = {}
        for _ in range(count):
            self._start()

    def measure(self, jobs: Jobs, done: Done) -> list[Outcome]:
        """See `Measure`."""
        found: dict[int, Outcome] = {}
        waiting = list(enumerate(jobs))
        busy: dict[Any, int] = {}
        while len(found) < len(jobs):
            for pipe in list(self._running):
                if pipe not in busy and waiting:
                    place, job = waiting.pop(0)
                    busy[pipe] = place
                    with _ignored():  # a worker that died meanwhile is noticed below
                        pipe.send((job[0].tolist(), job[1]))
            for pipe in connection.wait(list(busy)):
                place = busy.pop(pipe)
                found[place] = self._receive(pipe)
                done(place, found[place])
        return [found[place] for place in range(len(jobs))]

    def close(self) -> None:
        """End the processes: one that waits for work ends by itself."""
        for pipe in self._running:
            pipe.close()
        for process in self._running.values():
            process.join(GRACE)
            process.terminate()
            process.join()
        self._running = {}

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        told = (theirs, self._tree, self._session.source, self._weights, self._threads, os.getpid())
        process = self._context.Process(target=work, args=told, daemon=True)
        with _no_main_module():
            process.start()
        theirs.close()
        self._running[ours] = process

    def _receive(self, pipe: Any) -> Outcome:
        try:
            outcome: Outcome = pipe.recv()
        except (EOFError, OSError):
            process = self._running.pop(pipe)
            process.join()
            self._deaths += 1
            if self._deaths == STARTS:
                self.close()
                raise BackendError(
                    f"{STARTS} workers in a row ended without a result (the last with code {process.exitcode}; -9 is often a lack "
                    "of memory): see their output above, or set num_workers to 1"
                ) from None
            self._start()
            return Outcome(error=f"its process ended without a result (code {process.exitcode})")
        self._deaths = 0
        return outcome


def work(pipe: Any, tree: dict[str, Any], backend: Any, weights: dict[str, Tensor], threads: int, starter: int) -> None:
    """A worker's life: one outcome for each job, until the process `starter` is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter hears it too, and ends its workers
    end_with(starter)
    torch.set_num_threads(threads)
    from aligntune.trainers.meta_es import MetaESSession

    session = MetaESSession(resolve(tree), backend)
    use_weights(session.model, weights)
    while True:
        try:
            theta, seed = pipe.recv()
        except EOFError:
            return
        pipe.send(session.candidates(torch.tensor(theta, dtype=torch.float64), seed))


def shared_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers, which other processes can see; on the CPU they move to shared memory."""
    _raise_file_limit()
    tensors = {name: tensor.detach() for name, tensor in _tensors(model)}
    for tensor in tensors.values():
        if tensor.device.type == "cpu":
            tensor.share_memory_()
    return tensors


@torch.no_grad()
def use_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Lay `weights` in place of the model's own: those that are trained as a copy, the others as they are."""
    for name, tensor in _tensors(model):
        tensor.data = weights[name].clone() if tensor.requires_grad else weights[name]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _raise_file_limit() -> None:
    """Each shared tensor is an open file."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _ignored() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Workers import what they need by name: the starter's script is not run again in them, guarded or not."""
    main = sys.modules["__main__"]
    saved = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    main.__spec__ = None
    if "__file__" in saved:
        del main.__file__
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(main, name, value)
