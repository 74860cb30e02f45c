"""The TRL backend: the config in TRL's own words, through its public API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aligntune.backends.base import Run, missing
from aligntune.config.enums import AlgorithmType
from aligntune.config.optimizers import SPLIT_OPTIMIZERS
from aligntune.config.run import SFTRunConfig

if TYPE_CHECKING:
    from aligntune.trainers.session import Session


GRPO_FAMILY = (AlgorithmType.GRPO, AlgorithmType.DAPO, AlgorithmType.DR_GRPO, AlgorithmType.GSPO)


class TRLBackend:
    name = "trl"

    def available(self) -> str | None:
        return missing("torch") or missing("trl")

    def can_run(self, run: Run) -> str | None:
        if own := _own(run):
            return own
        if isinstance(run, SFTRunConfig):
            if any(source.task_type.is_classification for source in run.sources):
                return "has no trainer for classification"
            return None
        if run.algorithm is AlgorithmType.PPO:
            return "PPO left TRL in 1.13"
        if run.algorithm in GRPO_FAMILY:
            from aligntune.backends.trl.cannot import grpo

            return grpo(run)
        if run.algorithm is AlgorithmType.DPO:
            from aligntune.backends.trl.cannot import dpo

            return dpo(run)
        return f"TRL has no {run.algorithm.value}"

    def load_policy(self, session: Session, **head: Any) -> Any:
        from aligntune.models.forward import model_head
        from aligntune.models.load import load_policy

        model = load_policy(session.config.model, session.precision, seed=session.config.train.seed, **head)
        model_head(model)  # raises where an adapter lies around it, which TRL does not train either
        return model

    def build_trainer(self, session: Any, callbacks: Sequence[Any]) -> Any:
        # TRL rounds the adapters of a quantised model to bfloat16, in which small updates are lost.
        whole = [(weight, weight.data) for weight in session.model.parameters() if weight.requires_grad]
        trainer = self.trainer(session, callbacks)
        for weight, data in whole:
            if weight.dtype != data.dtype:
                weight.data = data.to(weight.device)
        return trainer

    def trainer(self, session: Any, callbacks: Sequence[Any]) -> Any:
        """TRL's trainer of a session, as TRL makes it."""
        if session.config.algorithm is AlgorithmType.SFT:
            from aligntune.backends.trl.sft import sft_trainer

            return sft_trainer(session, callbacks)
        if session.config.algorithm is AlgorithmType.DPO:
            from aligntune.backends.trl.dpo import dpo_trainer

            return dpo_trainer(session, callbacks)
        from aligntune.backends.trl.grpo import grpo_trainer

        return grpo_trainer(session, callbacks)


def _own(run: Run) -> str | None:
    """A setting that only our own trainers have, or None."""
    if run.train.optimizer in SPLIT_OPTIMIZERS:
        return f"does not know optimizer {run.train.optimizer}"
    if run.train.micro_batch_tokens is not None:
        return "does not cut batches by tokens (micro_batch_tokens)"
    for name in ("loss_function", "advantage_function"):
        if getattr(run.train, name, None) is not None:
            return f"has no place for {name}"
    given = run.model.compile or run.model.selective_checkpointing != "off"
    return "does not compile decoder layers (compile, selective_checkpointing)" if given else None
