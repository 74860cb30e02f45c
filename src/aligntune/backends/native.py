"""The native backend: our own trainers on `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aligntune.backends.base import Run, missing
from aligntune.config.launch import SHARDED
from aligntune.config.run import SFTRunConfig
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.trainers.session import Session


class NativeBackend:
    name = "native"

    def available(self) -> str | None:
        return missing("torch") or missing("transformers")

    def can_run(self, run: Run) -> str | None:
        if isinstance(run, SFTRunConfig) and run.train.activation_offloading and run.launch.strategy in SHARDED:
            return f"does not offload activations of sharded weights (activation_offloading, launch.strategy {run.launch.strategy})"
        return None

    def load_policy(self, session: Session, **head: Any) -> Any:
        from aligntune.models.load import load_policy

        model = load_policy(session.config.model, session.precision, seed=session.config.train.seed, **head)
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            raise ConfigError(
                "the model's config asks for the loss of its experts' router (output_router_logits), which native training does not "
                "add: set backend: trl, or turn it off by model.model_init_kwargs: {output_router_logits: false}"
            )
        return model

    def build_trainer(self, session: Session, callbacks: Sequence[Any]) -> Any:
        return session.native_trainer(callbacks)
