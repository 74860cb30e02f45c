"""How do two processes that do not trust each other call one another's functions? As JSON frames of plain values.

A value is itself when JSON has it, `["i", hex]`, `["b", latin-1]` or `["c", re, im]` for large integers, bytes and
complex numbers, or `["#", n]`, the n-th entry of the frame's table: containers, instances of classes both sides
know, and handles to what cannot be copied. The table keeps sharing and cycles, and neither direction recurses with the
depth of a list. Subclasses of the plain types travel as the plain type, so an object cannot bring its own `__eq__`.
Nothing is unpickled, and no name that arrives is looked up outside the tables the receiver filled itself.
"""

from __future__ import annotations

import datetime
import json
import os
import struct
from collections import Counter, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME = 32 << 20


class ProtocolError(Exception):
    """The other side sent something that is no frame, or closed the channel."""


class Unsendable(Exception):
    """The value can neither be copied nor lent to the other side."""


TYPES = {cls.__name__: cls for cls in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)}

MOMENTS: dict[str, Any] = {cls.__name__: cls for cls in (datetime.datetime, datetime.date, datetime.time)}

Instance = Callable[[object], str | None]  # the name of the class under which both sides know this object, or None
Lend = Callable[[object], list[Any]]  # ["code" | "test", id] for an object that stays where it is, or Unsendable


class _Encoder:
    def __init__(self, instance: Instance, lend: Lend) -> None:
        self.instance, self.lend = instance, lend
        self.seen: dict[int, int] = {}
        self.queue: list[object] = []

    def value(self, item: object) -> Any:
        if item is None or item is True or item is False:
            return item
        if isinstance(item, str):
            return str.__str__(item)
        if isinstance(item, int):
            whole = int.__index__(item)
            return whole if -(1 << 63) < whole < 1 << 63 else ["i", hex(whole)]
        if isinstance(item, float):
            return float.__float__(item)
        if isinstance(item, bytes | bytearray):
            return ["b" if isinstance(item, bytes) else "B", bytes(item).decode("latin-1")]
        if isinstance(item, complex):
            return ["c", complex.__complex__(item).real, complex.__complex__(item).imag]
        index = self.seen.get(id(item))
        if index is None:
            index = self.seen[id(item)] = len(self.queue)
            self.queue.append(item)
        return ["#", index]

    def entry(self, item: object) -> list[Any]:
        value = self.value
        if isinstance(item, list):
            return ["l", [value(part) for part in list.__iter__(item)]]
        if isinstance(item, tuple):
            return ["t", [value(part) for part in tuple.__iter__(item)]]
        if isinstance(item, dict):
            kind = "C" if isinstance(item, Counter) else "d"
            return [kind, [[value(key), value(part)] for key, part in dict.items(item)]]
        if isinstance(item, set):
            return ["s", [value(part) for part in set.__iter__(item)]]
        if isinstance(item, frozenset):
            return ["f", [value(part) for part in frozenset.__iter__(item)]]
        return self.scalar_entry(item) or self.object_entry(item)

    def scalar_entry(self, item: object) -> list[Any] | None:
        if isinstance(item, deque):
            return ["q", [self.value(part) for part in deque.__iter__(item)], item.maxlen]
        if type(item) is Fraction:
            return ["F", self.value(item.numerator), self.value(item.denominator)]
        if type(item) is Decimal:
            return ["D", str(item)]
        if type(item) is range:
            return ["r", self.value(item.start), self.value(item.stop), self.value(item.step)]
        if type(item) in MOMENTS.values():
            return ["T", type(item).__name__, item.isoformat()]  # type: ignore[attr-defined]
        return None

    def object_entry(self, item: object) -> list[Any]:
        if isinstance(item, type) and item in TYPES.values():
            return ["y", item.__name__]
        name = self.instance(item)
        if name is not None:
            return ["o", name, [[key, self.value(part)] for key, part in vars(item).items()]]
        module = type(item).__module__.split(".")[0]
        if module in ("numpy", "torch", "pandas") and hasattr(item, "tolist"):
            return ["v", self.value(item.tolist())]
        return ["h", *self.lend(item)]


def encode(item: object, instance: Instance, lend: Lend) -> Any:
    """`item` as JSON-ready data."""
    encoder = _Encoder(instance, lend)
    root = encoder.value(item)
    table: list[Any] = []
    while len(table) < len(encoder.queue):
        table.append(encoder.entry(encoder.queue[len(table)]))
    return [root, table]


Classes = Callable[[str], type]
Borrow = Callable[[str, int], object]


class _Decoder:
    """Containers that can hold themselves are made empty first and filled last; the others are made on demand."""

    def __init__(self, table: list[Any], classes: Classes, borrow: Borrow) -> None:
        self.table, self.classes, self.borrow = table, classes, borrow
        self.made: dict[int, Any] = {}

    def value(self, item: Any) -> Any:
        if not isinstance(item, list):
            return item
        tag = item[0]
        if tag == "#":
            return self.made[item[1]] if item[1] in self.made else self.make(item[1])
        if tag == "i":
            return int(item[1], 16)
        if tag in ("b", "B"):
            return (bytes if tag == "b" else bytearray)(item[1].encode("latin-1"))
        if tag == "c":
            return complex(item[1], item[2])
        raise ProtocolError(f"unknown tag {tag!r}")

    def make(self, index: int) -> Any:
        tag, *rest = self.table[index]
        if tag in ("t", "f"):
            made: Any = (tuple if tag == "t" else frozenset)(self.value(part) for part in rest[0])
        elif tag == "F":
            made = Fraction(self.value(rest[0]), self.value(rest[1]))
        elif tag == "D":
            made = Decimal(rest[0])
        elif tag == "y":
            made = TYPES[rest[0]]
        elif tag == "r":
            made = range(*(self.value(part) for part in rest))
        elif tag == "T":
            made = MOMENTS[rest[0]].fromisoformat(rest[1])
        elif tag == "v":
            made = self.value(rest[0])
        elif tag == "h":
            made = self.borrow(rest[0], rest[1])
        else:
            raise ProtocolError(f"unknown entry {tag!r}")
        self.made[index] = made
        return made

    def shells(self) -> None:
        empty = {"l": list, "d": dict, "C": Counter, "s": set}
        for index, (tag, *rest) in enumerate(self.table):
            if tag in empty:
                self.made[index] = empty[tag]()
            elif tag == "q":
                self.made[index] = deque(maxlen=rest[1])
            elif tag == "o":
                self.made[index] = object.__new__(self.classes(rest[0]))

    def fill(self) -> None:
        for index, (tag, *rest) in enumerate(self.table):
            if tag in ("l", "q"):
                self.made[index].extend(self.value(part) for part in rest[0])
            elif tag in ("d", "C"):
                dict.update(self.made[index], {self.value(key): self.value(part) for key, part in rest[0]})
            elif tag == "s":
                self.made[index].update(self.value(part) for part in rest[0])
            elif tag == "o":
                vars(self.made[index]).update({key: self.value(part) for key, part in rest[1]})


def decode(data: Any, classes: Classes, borrow: Borrow) -> Any:
    """The value behind `encode`'s data. Anything malformed raises `ProtocolError`."""
    try:
        root, table = data
        decoder = _Decoder(table, classes, borrow)
        decoder.shells()
        decoder.fill()
        return decoder.value(root)
    except ProtocolError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError, ArithmeticError) as error:
        raise ProtocolError(f"malformed value ({type(error).__name__}: {error})") from error


def send(descriptor: int, frame: object) -> None:
    """Write one frame: four bytes of length, then JSON."""
    body = json.dumps(frame, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise Unsendable(f"a value of {len(body)} bytes is larger than the {MAX_FRAME} that fit one call")
    data = memoryview(struct.pack(">I", len(body)) + body)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        raise ProtocolError("the other process has ended") from error


def _read(descriptor: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = os.read(descriptor, min(count - len(parts), 1 << 20))
        except OSError as error:
            raise ProtocolError("the other process has ended") from error
        if not part:
            raise ProtocolError("the other process has ended")
        parts += part
    return bytes(parts)


def receive(descriptor: int) -> Any:
    """Read one frame, or raise `ProtocolError`."""
    (length,) = struct.unpack(">I", _read(descriptor, 4))
    if length > MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes")
    try:
        return json.loads(_read(descriptor, length))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a frame that is not JSON") from error
