"""What must a trainer do when a model is wrapped or split over processes? Autocast, gathering, waiting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class AutocastLoss(_Base):
    """Mixin for trainers that compute their loss from the model's parts: the run's precision holds for all of it.

    accelerate puts autocast into the model's own forward pass, which such a loss does not use.
    """

    def compute_loss_context_manager(self) -> ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(self.accelerator.autocast())
        return stack


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some weight (FSDP2, DeepSpeed ZeRO-3)."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def full_state(trainer: Any) -> dict[str, torch.Tensor] | None:
    """All weights of a sharded model, gathered to the main process's memory; None when the model is whole everywhere.

    Every process must call it. On the others the result is empty or partial.
    """
    if trainer is None or not is_sharded(trainer.model):
        return None
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    state: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(model)
    return state


def in_group() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()


def wait_for_all() -> None:
    """Return when every process of the run has come here."""
    if in_group():
        distributed.barrier()


def largest_of_all(number: float, device: torch.device) -> float:
    """The largest of a number over all processes; every process must call it."""
    if not in_group():
        return number
    most = torch.tensor(number, device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return most.item()


def gathered(records: Sequence[Any]) -> list[Any]:
    """The records of all processes, by rank; every process must call it."""
    if not in_group():
        return list(records)
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, list(records))
    return [record for part in parts for record in part]


def first_of_all(number: float, device: torch.device) -> float:
    """The first process's number; every process must call it."""
    if not in_group():
        return number
    first = torch.tensor(number, dtype=torch.float64, device=device)
    distributed.broadcast(first, 0)
    return first.item()


def use_own_device() -> None:
    """Make this process's accelerator the current one, before a model is loaded onto "the" accelerator."""
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and place < torch.cuda.device_count():
        torch.cuda.set_device(place)
