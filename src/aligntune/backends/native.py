"""The native backend: our own trainers on `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aligntune.backends.base import Run
from aligntune.config.enums import AlgorithmType
from aligntune.models.load import load_policy

if TYPE_CHECKING:
    from aligntune.trainers.session import Session


class NativeBackend:
    name = "native"

    def can_run(self, run: Run) -> str | None:
        return None if run.algorithm is AlgorithmType.SFT else "this algorithm is not implemented yet"

    def load_policy(self, session: Session, **head: Any) -> Any:
        return load_policy(session.config.model, session.precision, **head)

    def build_trainer(self, session: Session, callbacks: Sequence[Any]) -> Any:
        from aligntune.trainers.sft import native_sft_trainer

        return native_sft_trainer(session, callbacks)
