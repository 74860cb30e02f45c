"""The Unsloth backend: found without being imported, since importing it changes transformers and TRL for good."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from aligntune.backends.base import Run


class UnslothBackend:
    name = "unsloth"

    def can_run(self, run: Run) -> str | None:
        if importlib.util.find_spec("unsloth") is None:
            return "is not installed (pip install 'aligntune[unsloth]')"
        return "running it is not implemented yet"

    def load_policy(self, session: Any, **head: Any) -> Any:
        raise NotImplementedError

    def build_trainer(self, session: Any, callbacks: Sequence[Any]) -> Any:
        raise NotImplementedError
