"""What can a user fix? Every error that a person can act on is one of these classes.

The command line prints them without a traceback and exits with code 2. Each class also subclasses the
standard-library type that a Python caller would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class AlignTuneError(Exception):
    """A problem the user can fix. The message says what is wrong and what to do about it."""


class ConfigError(AlignTuneError, ValueError):
    """A setting is unknown, contradictory, out of range, or cannot act in this run."""


class DataError(AlignTuneError, ValueError):
    """A dataset is missing, empty, or has rows that cannot be trained on."""


class ModelError(AlignTuneError, ValueError):
    """A model or tokenizer cannot be loaded, or does not fit the task."""


class RewardError(AlignTuneError, ValueError):
    """A reward function is unknown, misses a column, raised, or returned something that is not a score."""


class BackendError(AlignTuneError, RuntimeError):
    """The chosen backend cannot run this config; the message gives the reason."""


class MissingExtra(AlignTuneError, ImportError):
    """An optional package is needed and absent; the message names the extra that brings it."""


def require(module: str, *, extra: str, why: str = "") -> ModuleType:
    """Import an optional package, or raise `MissingExtra` naming the extra that installs it.

    `module` is the dotted import name, `extra` the name in `pip install 'aligntune[extra]'`,
    `why` the setting or feature that needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != package:
            raise
        reason = f" ({why})" if why else ""
        raise MissingExtra(
            f"the package '{package}' is needed{reason} and is not installed: pip install 'aligntune[{extra}]'"
        ) from error
