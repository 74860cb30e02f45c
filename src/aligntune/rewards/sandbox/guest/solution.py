"""What does the process with the model's code do? Run the code once, then answer the tests' calls.

This process holds the code and nothing else: no test, no expected value, no descriptor but the channel. Whatever the
code overwrites, patches or registers stays in here, and all it can tell the tests is what its functions return.
"""

from __future__ import annotations

import operator
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

from . import wire
from .peer import CODE, Peer

MODULE = "solution"


class Callback:
    """A function that a test passed as an argument, callable from the code."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self._borrowed_number = peer, number

    _borrowed_number = -1

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self._peer.request("call", self, *args, **kwargs)


OPERATIONS: dict[str, Callable[..., object]] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "isinstance": isinstance,
    "contains": operator.contains,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    **{builtin.__name__: builtin for builtin in (len, iter, next, str, repr, bool, hash, int, float, abs)},
    **{
        name: getattr(operator, name)
        for name in ["eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg"]
    },
}


class Solution:
    """The namespace of the code and the operations on it."""

    def __init__(self, descriptor: int) -> None:
        self.module = types.ModuleType(MODULE)
        self.peer = Peer(descriptor, CODE, self.answer)
        self.peer.borrow = lambda number: Callback(self.peer, number)

    def load(self, shared: list[str]) -> dict[str, Any]:
        """Run the code; returns its top-level names. `shared` are classes whose instances are copied."""
        sys.modules[MODULE] = self.module
        exec(compile(self.code, f"<{MODULE}>", "exec"), vars(self.module))
        exceptions: dict[str, list[str]] = {}
        others: list[str] = []
        for name, item in list(vars(self.module).items()):
            if name.startswith("__") or isinstance(item, types.ModuleType):
                continue
            if isinstance(item, type) and issubclass(item, BaseException):
                exceptions[name] = [ancestor.__name__ for ancestor in item.__mro__]
            else:
                others.append(name)
            if name in shared and isinstance(item, type):
                self.peer.classes[name] = item
        return {"exceptions": exceptions, "others": others}

    def answer(self, op: str, *args: Any, **kwargs: Any) -> object:
        if op == "load":
            return self.load(*args)
        if op == "name":
            return getattr(self.module, *args)
        if op == "call_in_place":
            target, *rest = args
            result = target(*rest, **kwargs)
            return result, rest
        return OPERATIONS[op](*args, **kwargs)

    def run(self) -> None:
        self.code = wire.receive(self.peer.descriptor)["code"]
        while True:
            try:
                self.peer.serve(wire.receive(self.peer.descriptor))
            except wire.ProtocolError:
                return


def main(descriptor: int) -> None:
    """Serve until the tests close the channel."""
    random.seed(0)  # the same code gets the same verdict twice
    Solution(descriptor).run()
    os._exit(0)
