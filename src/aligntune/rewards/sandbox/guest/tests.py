"""What does the process with the tests do? Run them against proxies of the code and report each result upward.

The tests, their expected values and the verdict descriptor live here, in a process that the code can neither see,
signal nor trace; it is confined all the same, for a test may misbehave on a strange answer.
"""

from __future__ import annotations

import builtins
import functools
import os
import random
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from . import wire
from .peer import TEST, Peer
from .proxy import Proxy

Unit = tuple[str, Callable[[], object]]  # the name of a test and how to run it


class Tests:
    """One job: `setup` and `tests` (source), `entry_point`, `names` to choose among test functions, `in_place`."""

    def __init__(self, channel: int, job: dict[str, Any]) -> None:
        self.job = job
        self.peer = Peer(channel, TEST, self.answer)
        self.peer.borrow = lambda number: Proxy(self.peer, number, bool(job.get("in_place")))
        self.peer.may_lend = callable
        self.module = types.ModuleType("tests")
        self.module.__dict__["__builtins__"] = builtins
        sys.modules["tests"] = self.module

    def answer(self, op: str, *args: Any, **kwargs: Any) -> object:
        if op != "call":
            raise wire.ProtocolError(f"the code asked the tests for {op!r}")
        target, *rest = args
        if not any(target is item for item in self.peer.lent):
            raise wire.ProtocolError("the code called something it was not given")
        return target(*rest, **kwargs)

    def prepare(self) -> None:
        """Run the setup and note which names the tests mention; an error here is the dataset's, not the code's."""
        namespace = vars(self.module)
        exec(compile(self.job.get("setup", ""), "<setup>", "exec"), namespace)
        self.own = {name for name in namespace if not name.startswith("__")}
        self.peer.classes = {
            name: namespace[name]
            for name in self.own
            if isinstance(namespace[name], type) and namespace[name].__module__ == "tests"
        }
        self.programs = [compile(source, "<test>", "exec") for source in self.job["tests"]]
        self.mentioned = {self.job.get("entry_point"), *(name for part in self.programs for name in _names(part))}

    def load(self) -> None:
        """Have the code run, and bind those of its names that the tests mention."""
        found = self.peer.request("load", list(self.peer.classes))
        entry_point = self.job.get("entry_point")
        if entry_point and entry_point not in found["others"]:
            raise NameError(f"the code does not define {entry_point}")
        names: dict[str, Any] = {}
        for name, ancestors in found["exceptions"].items():
            if name in self.mentioned:
                names[name] = self.peer.exceptions[name] = _exception(name, ancestors)
        names |= {name: self.peer.request("name", name) for name in found["others"] if name in self.mentioned}
        taken = (self.own | set(vars(builtins))) - {entry_point}
        vars(self.module).update({name: item for name, item in names.items() if name not in taken})
        solution = types.ModuleType("solution")
        vars(solution).update(names)
        sys.modules[self.job.get("module") or "solution"] = solution

    def units(self) -> Iterator[Unit]:
        """The tests one by one: each source of a list, `check(candidate)`, or the test functions by name."""
        namespace = vars(self.module)
        if self.job["kind"] == "statements":
            for source, program in zip(self.job["tests"], self.programs, strict=True):
                yield source, functools.partial(exec, program, namespace)
            return
        for program in self.programs:
            exec(program, namespace)
        if self.job["kind"] == "check":
            yield "check", lambda: namespace["check"](namespace[self.job["entry_point"]])
            return
        yield from self.functions(namespace)

    def functions(self, namespace: dict[str, Any]) -> Iterator[Unit]:
        found: dict[str, Callable[[], object]] = {}
        for name, item in list(namespace.items()):
            if isinstance(item, types.FunctionType) and name.startswith("test"):
                found[name] = item
            elif isinstance(item, type) and issubclass(item, unittest.TestCase):
                methods = unittest.TestLoader().getTestCaseNames(item)
                found |= {f"{name}.{method}": item(method).debug for method in methods}
        for name in found if self.job.get("names") is None else self.job["names"]:
            yield name, found.get(name, _no_such_test)


def _no_such_test() -> None:
    raise NameError("the tests define no such test")


def _names(program: types.CodeType) -> Iterator[str]:
    """Every name a program mentions, imports or takes as an attribute."""
    yield from program.co_names
    for constant in program.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, tuple):  # what `from solution import f` names
            yield from (part for part in constant if isinstance(part, str))


def _exception(name: str, ancestors: list[str]) -> type[Exception]:
    """A class for the tests to catch, with the nearest built-in ancestor that the code's own class has."""
    for ancestor in ancestors:
        base = getattr(builtins, ancestor, None)
        if isinstance(base, type) and issubclass(base, Exception):
            return type(name, (base,), {})
    return type(name, (Exception,), {})


def _outcome(run: Callable[[], object]) -> str:
    """'' when the test passed, else why not. A skipped test has not passed."""
    try:
        run()
    except AssertionError as error:
        return f"assertion failed {str(error)[:300]}".strip()
    except BaseException as error:  # noqa: BLE001 - however a test ends, it has not passed
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


def main(channel: int, verdict: int) -> None:
    """Read the job from `verdict`, run it, write one frame a test and a last frame with the number of tests."""
    random.seed(0)  # the same code gets the same verdict twice
    tests = Tests(channel, wire.receive(verdict))
    broken = _outcome(tests.prepare)
    if broken:
        wire.send(verdict, {"broken": broken})
        os._exit(0)
    failure, count = _outcome(tests.load), 0
    try:
        for name, run in () if failure else tests.units():
            wire.send(verdict, {"test": name[:200], "failure": _outcome(run)})
            count += 1
    except Exception as error:  # noqa: BLE001 - a test file that fails while it is read
        failure = f"{type(error).__name__}: {str(error)[:300]}"
    wire.send(verdict, {"ended": count, "failure": failure})
    os._exit(0)
