"""What do all native trainers change of transformers' `Trainer`? The time and memory around the model.

Between two steps a GPU waits for whatever the processor does. transformers walks over all modules of the model four times in that
gap, and PEFT puts about ten modules around each projection: 2,001 in a LoRA model of 24 layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer


class NativeTrainer(Trainer):
    """transformers' `Trainer` with short walks, and gradients that lie in DDP's own buckets.

    DDP otherwise keeps each gradient twice, and copies it to its bucket and back
    (`torch.nn.parallel.DistributedDataParallel`, `gradient_as_bucket_view`).
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.gradient_as_bucket_view = True

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six for each token and weight outside the embeddings, as transformers counts, which adds up the weights every time."""
        return 6 * inputs["input_ids"].numel() * self._weights if "input_ids" in inputs else 0

    @cached_property
    def _weights(self) -> int:
        count = getattr(self.model, "num_parameters", None)
        return int(count(exclude_embeddings=True)) if count is not None else 0

    def _run_epoch(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with listed(model):
            return super()._run_epoch(model, *args, **kwargs)


@contextmanager
def listed(model: nn.Module) -> Iterator[None]:
    """Inside, `model.parameters()` and a `model.train()` that has nothing to change read lists that are made here, once.

    FSDP2 takes whole weights out of a model and puts parts back in while it computes: there the weights are not listed. Partials,
    not closures: a copy of the model has lists of its own.
    """
    lists: dict[str, Any] = {"train": partial(_train, model, list(model.modules()))}
    if not isinstance(model, FSDPModule):
        lists["parameters"] = partial(_parameters, model, list(model.parameters()))
    vars(model).update(lists)
    try:
        yield
    finally:
        for name in lists:
            del vars(model)[name]


def _parameters(model: nn.Module, every: Sequence[nn.Parameter], recurse: bool = True) -> Iterator[nn.Parameter]:
    return iter(every) if recurse else type(model).parameters(model, recurse=False)


def _train(model: nn.Module, every: Sequence[nn.Module], mode: bool = True) -> nn.Module:
    if any(module.training is not mode for module in every):
        type(model).train(model, mode)
    return model
