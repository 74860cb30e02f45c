"""Which settings do not act yet? They are refused by name until they do; every other setting acts.

A test walks the schema, changes each setting that is not listed here, and observes an effect.
"""

from __future__ import annotations

from typing import Any

from aligntune.config.enums import AlgorithmType
from aligntune.config.synonyms import Path

NOT_YET: dict[Path, str] = {}
"""Path -> what is missing."""


def refusal(algorithm: AlgorithmType, path: Path, value: Any) -> str | None:
    """Why the setting is refused, or None when it acts."""
    missing = NOT_YET.get(path)
    return f"is not implemented yet ({missing})" if missing is not None else None
