"""A case says: with this setting changed, that observation changes. The heart of the suite: no setting is inert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aligntune.api import session_class
from aligntune.backends.select import choose
from aligntune.config.resolve import resolve
from aligntune.errors import MissingExtra

Observe = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """`path` set to `value` on top of `base` changes what `observe` sees of the session; `against` is compared with
    (unset: the default)."""

    path: str
    value: Any
    observe: Observe
    base: Mapping[str, Any] = field(default_factory=dict)
    against: Any = None

    def __str__(self) -> str:
        return f"{self.path}={self.value!r:.40}"


def four_bits(model_of: Callable[[Any], Any]) -> Observe:
    """Whether the weights of a model of the session are packed in 4 bits; without bitsandbytes the error that names it."""

    def look(s: Any) -> Any:
        try:
            return any(weight.dtype == torch.uint8 for weight in model_of(s).parameters())
        except MissingExtra as error:
            return str(error)

    return look


def session(common: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A session of `common` settings with dotted `settings` on top."""
    tree: dict[str, Any] = {}
    for path, value in {**common, **settings}.items():
        section, _, name = path.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    resolved = resolve(tree)
    backend, reasons = choose(resolved.config)
    return session_class(resolved)(resolved, backend, reasons)


def observed(common: Mapping[str, Any], case: Case) -> tuple[Any, Any]:
    """What is seen without and with the change. Cases that start from the same settings look at those once."""
    before = dict(case.base)
    if case.against is not None:
        before[case.path] = case.against
    same = {path: value for path, value in {**common, **before}.items() if path != "logging.output_dir"}
    key = (case.observe, repr(sorted(same.items())))
    if key not in _SEEN:
        _SEEN[key] = case.observe(session(common, before))
    return _SEEN[key], case.observe(session(common, {**case.base, case.path: case.value}))


_SEEN: dict[tuple[Observe, str], Any] = {}
"""What is seen of settings, whatever folder a run writes to."""
