"""Where do activations wait for the backward pass? On the GPU, or in CPU memory for a run that asks for it.

The moving is TRL's (`trl.models.activation_offloading`, from torchtune): every tensor of a kilobyte or more that autograd
saves is copied to pinned CPU memory on a stream of its own and fetched back before it is needed; weights and what the
language-model head saves stay. With gradient checkpointing it is the layers' inputs that move.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class OffloadedActivations(_Base):
    """Mixin: `offload_activations` makes the training steps, forward and backward, keep activations in CPU memory."""

    offloading: AbstractContextManager[Any] = nullcontext()

    def offload_activations(self) -> None:
        """From the next step on. Needs an accelerator, and weights that are whole on it."""
        self.offloading = _offloading(self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.offloading:
            return super().training_step(*args, **kwargs)


def _offloading(model: nn.Module) -> AbstractContextManager[Any]:
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    mover: Any = get_act_offloading_ctx_manager(model=model)
    if not getattr(model, "is_quantized", False) and hasattr(mover, "device_module"):
        mover.device_module = _KeepsItsCache(mover.device_module)
    found: AbstractContextManager[Any] = mover
    return found


class _KeepsItsCache:
    """`torch.cuda`, say, whose cache is not emptied: TRL's mover does so in every step once bitsandbytes is imported, for the
    buffers of quantised layers."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def empty_cache(self) -> None:
        """Nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
