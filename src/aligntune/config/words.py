"""Do two words mean the same name, and which name was meant? Without pydantic: the sandbox of rewards runs where only Python is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def plain_word(value: str) -> str:
    """The form in which words are compared: lower case, '_' for '-' and blanks."""
    return value.strip().lower().replace("-", "_").replace(" ", "_")


def closest(word: str, known: Iterable[str]) -> str | None:
    """The first known name that `word` is the beginning of, or that it is nearly."""
    names, word = list(known), word.lower()
    longer = [name for name in names if len(word) > 3 and name.lower().startswith(word)]
    return next(iter(longer or difflib.get_close_matches(word, names, n=1, cutoff=0.7)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """ ": did you mean NAME?", or nothing where no name is near."""
    close = closest(word, known)
    return f": did you mean {close}?" if close else ""


def not_among(value: object, known: Iterable[str]) -> str:
    """The message about a value that should be one of some names."""
    names = list(known)
    close = closest(plain_word(value), names) if isinstance(value, str) else None
    return f"should be one of {', '.join(names)}" + (f" (did you mean {close}?)" if close else "")
