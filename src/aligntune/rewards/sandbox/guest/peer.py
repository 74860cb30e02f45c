"""How do calls cross between the tests and the code under test? A symmetric request-and-answer loop over `wire`.

Each side keeps what it lent in its own table and answers requests by its own rules: the code's side does whatever
is asked, since nothing is at stake there; the tests' side only calls functions that a test passed as an argument.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from . import wire

CODE, TEST = "code", "test"


class RemoteError(Exception):
    """The code under test raised an exception of a class that only it knows."""


class Peer:
    """One end of the channel. `side` is CODE or TEST; `answer(op, *args, **kwargs)` serves the other side's requests."""

    def __init__(self, descriptor: int, side: str, answer: Callable[..., object]) -> None:
        self.descriptor, self.side, self.answer = descriptor, side, answer
        self.lent: list[object] = []
        self.classes: dict[str, type] = {}  # classes that both sides define: their instances are copied
        self.exceptions: dict[str, type[BaseException]] = {}
        self.borrow: Callable[[int], object] = lambda number: None  # makes the stand-in for the other side's object
        self.may_lend: Callable[[object], bool] = lambda item: True

    def _instance(self, item: object) -> str | None:
        name = type(item).__name__
        return name if self.classes.get(name) is type(item) and hasattr(item, "__dict__") else None

    def _lend(self, item: object) -> list[Any]:
        if hasattr(type(item), "_borrowed_number"):
            return [CODE if self.side == TEST else TEST, object.__getattribute__(item, "_borrowed_number")]
        if not self.may_lend(item):
            raise wire.Unsendable(f"a test cannot pass a {type(item).__name__} to the code: only plain values do")
        self.lent.append(item)
        return [self.side, len(self.lent) - 1]

    def _borrow(self, side: str, number: int) -> object:
        if side != self.side:
            return self.borrow(int(number))
        return self.lent[number]

    def encode(self, item: object) -> Any:
        return wire.encode(item, self._instance, self._lend)

    def decode(self, data: Any) -> Any:
        return wire.decode(data, self.classes.__getitem__, self._borrow)

    def request(self, op: str, *args: object, **kwargs: object) -> Any:
        """Ask the other side and wait for its answer, serving what it asks meanwhile; raises what it raised."""
        wire.send(self.descriptor, {"ask": op, "with": self.encode((args, kwargs))})
        while True:
            frame = wire.receive(self.descriptor)
            if not isinstance(frame, dict):
                raise wire.ProtocolError("a frame that is neither a request nor an answer")
            if "ask" in frame:
                self.serve(frame)
            elif "gives" in frame:
                return self.decode(frame["gives"])
            else:
                raise self._error(frame)

    def serve(self, frame: dict[str, Any]) -> None:
        """Answer one request."""
        try:
            args, kwargs = self.decode(frame["with"])
            reply = {"gives": self.encode(self.answer(frame["ask"], *args, **kwargs))}
        except wire.ProtocolError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever the code raises belongs to the test that called it
            reply = self._describe(error)
        wire.send(self.descriptor, reply)

    def _describe(self, error: BaseException) -> dict[str, Any]:
        names = [cls.__name__ for cls in type(error).__mro__ if issubclass(cls, BaseException)]
        try:
            message = str(error)[:2000]
            plain = all(isinstance(part, str | int | float | None) for part in error.args)
            args = self.encode(error.args) if plain else self.encode((message,))
        except BaseException:  # noqa: BLE001 - an exception whose own __str__ raises
            args = self.encode(("(its message cannot be shown)",))
        return {"raises": names, "args": args}

    def _error(self, frame: dict[str, Any]) -> BaseException:
        names, args = frame.get("raises"), self.decode(frame.get("args"))
        if not isinstance(names, list) or not isinstance(args, tuple):
            raise wire.ProtocolError("a frame that is neither a request nor an answer")
        for name in names:
            cls = self.exceptions.get(name) or getattr(builtins, str(name), None)
            if isinstance(cls, type) and issubclass(cls, Exception) and cls is not Exception:  # so never SystemExit
                try:
                    return cls(*args)  # type: ignore[misc]
                except TypeError:  # UnicodeDecodeError and the like want more than their message
                    continue
        return RemoteError(f"{names[0] if names else 'error'}: {' '.join(str(part) for part in args)}")
