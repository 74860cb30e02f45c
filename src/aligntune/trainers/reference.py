"""The frozen reference of a run: whose log-probabilities the policy is compared with.

| mode | when |
|---|---|
| `adapter disabled` | LoRA: the policy's own base, with the adapter switched off; costs no memory |
| `adapter NAME` | `ref_adapter_name`: another adapter on the same base |
| `copy` | full fine-tuning, `force_use_ref_model`, `ref_model_init_kwargs`, `sync_ref_model`: a frozen model of its own |

A copy is loaded as the policy was (`sft_path` if given, else `name_or_path`), never read back from a config's path, so that it
is what the policy was before its first step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from aligntune.errors import ConfigError
from aligntune.models.forward import packed_log_probs, runs_padded, use_padding
from aligntune.models.load import load_model
from aligntune.models.lora import parts_ends, untie
from aligntune.models.packed import PackedRows
from aligntune.models.save import merged, set_weights
from aligntune.models.tokenizer import fit_embeddings
from aligntune.models.wrapped import unwrapped
from aligntune.trainers.parallel import wait_for_all

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class Reference:
    """See the module. `mode` says which kind it is."""

    def __init__(self, model: nn.Module, mode: str, adapter: str | None = None) -> None:
        self.model, self.mode, self.adapter = model, mode, adapter
        self.moved = False
        """Whether its weights are no longer those that can be loaded again; true from the start where others move it."""

    @classmethod
    def build(cls, session: Any, policy: nn.Module) -> Reference:
        """The reference that the session's model section asks for; call it before the first step."""
        config, inner = session.config.model, unwrapped(policy)
        has_adapter = hasattr(inner, "peft_config")
        if config.ref_adapter_name is not None:
            if not has_adapter or config.ref_adapter_name not in inner.peft_config:  # type: ignore[operator]
                raise ConfigError(
                    f"model.ref_adapter_name: the policy has no adapter named {config.ref_adapter_name!r}"
                )
            return cls(inner, f"adapter {config.ref_adapter_name}", config.ref_adapter_name)
        moves = session.config.train.sync_ref_model
        if has_adapter and not (config.force_use_ref_model or config.ref_model_init_kwargs or moves):
            return cls(inner, "adapter disabled")
        if config.ref_model_init_kwargs or has_adapter:
            kwargs = config.ref_model_init_kwargs or None
            model = load_model(config, session.precision, trained=False, init_kwargs=kwargs)
            fit_embeddings(model, session.tokenizer)
            if moves and has_adapter and parts_ends(inner):
                untie(model)  # it will follow the merged policy
        else:
            model = copy.deepcopy(inner)
        if runs_padded(inner):
            use_padding(model)
        return cls(model.eval().requires_grad_(False), "copy")

    @torch.no_grad()
    def log_probs(self, rows: PackedRows, temperature: float = 1.0) -> Tensor:
        """[M] log-probabilities of the trained tokens of `rows`."""
        with self._active():
            return packed_log_probs(self.model, rows, temperature=temperature).log_probs

    @torch.no_grad()
    def sync(self, policy: nn.Module, alpha: float) -> None:
        """ref <- alpha * policy + (1 - alpha) * ref (TR-DPO, arXiv 2404.09656), an adapter of the policy merged."""
        inner: Any = unwrapped(policy)
        if hasattr(inner, "peft_config"):
            inner = merged(inner)
        for mine, theirs in zip(self.model.parameters(), inner.parameters(), strict=True):
            whole = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs
            mine.lerp_(whole.to(mine.dtype), alpha)
        self.moved = True

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, where a synchronisation has moved them; else empty, since they can be loaded again. Where they are sharded,
        every process must ask."""
        if not self.moved:
            return {}
        return {
            name: weight.full_tensor() if isinstance(weight, DTensor) else weight
            for name, weight in self.model.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        if state:
            set_weights(self.model, state, "the checkpoint's reference")
            self.moved = True

    @contextmanager
    def _active(self) -> Iterator[None]:
        training, model = self.model.training, self.model
        model.eval()
        try:
            if self.mode == "copy":
                yield
            elif self.adapter is None:
                with model.disable_adapter():  # type: ignore[operator]
                    yield
            else:
                before = model.active_adapter
                model.set_adapter(self.adapter)  # type: ignore[operator]
                try:
                    yield
                finally:
                    model.set_adapter(before)  # type: ignore[operator]
        finally:
            model.train(training)


class SyncReference(TrainerCallback):
    """Moves the reference towards the policy every `every` optimiser steps."""

    def __init__(self, reference: Reference, policy: nn.Module, alpha: float, every: int) -> None:
        self.reference, self.policy, self.alpha, self.every = reference, policy, alpha, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.reference.sync(self.policy, self.alpha)


STATE = "reference.pt"
"""File in a checkpoint that holds a reference which synchronisation has moved."""


class KeepsReference(_Base):
    """Mixin of a `transformers.Trainer`: a `reference` that moves is in its checkpoints."""

    reference: Reference | None

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if self.reference is not None and isinstance(resume_from_checkpoint, (str, Path)):
            moved = Path(resume_from_checkpoint) / STATE
            if moved.exists():
                self.reference.load_state_dict(torch.load(moved, map_location="cpu", weights_only=True))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_reference(self, checkpoint: Path) -> None:
        """Write a reference that has moved, so that a resumed run goes on from it."""
        state = self.reference.state_dict() if self.reference is not None else {}
        if state and self.is_world_process_zero():
            torch.save(state, checkpoint / STATE)
        wait_for_all()


class SavesReference(TrainerCallback):
    """Writes a reference that has moved beside every checkpoint."""

    def __init__(self, trainer: KeepsReference) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.save_reference(Path(args.output_dir) / f"checkpoint-{state.global_step}")
