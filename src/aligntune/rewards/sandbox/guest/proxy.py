"""How do tests hold an object that lives with the model's code? By a proxy that forwards what tests do with objects.

A proxy never equals a plain value and has no order with one: a test that compares an answer with an expected one must
have been given a plain answer. Two proxies are compared by the code's own methods, since both are its objects.
"""

from __future__ import annotations

from typing import Any

from .peer import Peer


class Proxy:
    """An object of the code under test: `_borrowed_number` is its number on that side."""

    __slots__ = ("_borrowed_number", "_in_place", "_peer")

    def __init__(self, peer: Peer, number: int, in_place: bool = False) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_borrowed_number", number)
        object.__setattr__(self, "_in_place", in_place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._in_place:
            return self._peer.request("call", self, *args, **kwargs)
        result, after = self._peer.request("call_in_place", self, *args, **kwargs)
        for before, now in zip(args, after, strict=True):
            _overwrite(before, now)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self._peer.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.request("setattr", self, name, value)

    def __eq__(self, other: object) -> Any:
        return isinstance(other, Proxy) and self._peer.request("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return not isinstance(other, Proxy) or self._peer.request("ne", self, other)

    def __hash__(self) -> int:
        return int(self._peer.request("hash", self))

    def __instancecheck__(self, item: object) -> bool:
        return isinstance(item, Proxy) and bool(self._peer.request("isinstance", item, self))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.request("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._peer.request("delitem", self, key)


def _overwrite(before: Any, now: Any) -> None:
    """Bring the change that the code made to a mutable argument back to the test's own object."""
    if isinstance(before, list | bytearray) and isinstance(now, list | bytearray):
        before[:] = now
    elif isinstance(before, dict | set) and type(before) is type(now):
        before.clear()
        before.update(now)


def _forward(op: str, plain: type | None = None) -> Any:
    def method(self: Proxy, *args: Any) -> Any:
        result = self._peer.request(op, self, *args)
        if plain is not None and type(result) is not plain:
            raise TypeError(f"the code's __{op}__ returned a {type(result).__name__}")
        return result

    return method


def _order(op: str) -> Any:
    def method(self: Proxy, other: object) -> Any:
        return self._peer.request(op, self, other) if isinstance(other, Proxy) else NotImplemented

    return method


for _op in ["contains", "getitem", "iter", "next", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs"]:
    setattr(Proxy, f"__{_op}__", _forward(_op))
for _op in ["lt", "le", "gt", "ge"]:
    setattr(Proxy, f"__{_op}__", _order(_op))
for _type in (len, str, repr, bool, int, float):
    _plain = {"len": int, "repr": str}.get(_type.__name__, _type)
    setattr(Proxy, f"__{_type.__name__}__", _forward(_type.__name__, _plain))  # type: ignore[arg-type]
