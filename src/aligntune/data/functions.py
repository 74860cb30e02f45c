"""Which Python function does a setting name? `module:function`, `file.py:function`, or the callable itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from aligntune.errors import ConfigError


def find_function(address: str | Callable[..., Any], setting: str) -> Callable[..., Any]:
    """The callable behind `address`; `setting` is the name shown in errors.

    Raises:
        ConfigError: no such module, file or function.
    """
    if callable(address):
        return address
    where, _, name = address.rpartition(":")
    module = _load(where, setting)
    function = module
    for part in name.split("."):
        function = getattr(function, part, None)  # type: ignore[assignment]
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{setting}: {where} has no function {name!r} (it has: {', '.join(names) or 'none'})")
    return function


def _load(where: str, setting: str) -> ModuleType:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise ConfigError(f"{setting}: there is no file {where}")
        # Registered under a name of our own: worker processes unpickle the function by module name.
        spec = importlib.util.spec_from_file_location(f"aligntune_user_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and not where.startswith(error.name):
            raise
        raise ConfigError(f"{setting}: there is no module {where!r} on the Python path") from None
