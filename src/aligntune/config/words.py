"""Do two words mean the same name? Without pydantic: the sandbox of rewards runs where only Python is."""

from __future__ import annotations


def plain_word(value: str) -> str:
    """The form in which words are compared: lower case, '_' for '-' and blanks."""
    return value.strip().lower().replace("-", "_").replace(" ", "_")
