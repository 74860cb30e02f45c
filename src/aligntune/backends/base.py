"""What is a backend? A name, an honest answer to "can you run this?", and a way to build the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from aligntune.config.run import RLRunConfig, SFTRunConfig

if TYPE_CHECKING:
    from aligntune.trainers.session import Session


def missing(package: str) -> str | None:
    """Why a backend whose package is not installed is not available."""
    return None if find_spec(package) is not None else f"{package} is not installed (pip install {package})"


Run = SFTRunConfig | RLRunConfig


class Backend(Protocol):
    """Stateless; one instance per process."""

    name: str

    def available(self) -> str | None:
        """None, or why this backend cannot run anything on this machine; nothing is imported that it would change."""

    def can_run(self, run: Run) -> str | None:
        """None, or why this backend cannot run `run` on any machine, as the end of the sentence "trl: ..."."""

    def load_policy(self, session: Session, **head: Any) -> Any:
        """The model to train, on its device, with its adapter."""

    def build_trainer(self, session: Session, callbacks: Sequence[Any]) -> Any:
        """The `transformers.Trainer` that trains the session's model on its rows."""
