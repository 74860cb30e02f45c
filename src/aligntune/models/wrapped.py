"""How does a computation of ours run inside the wrappers that synchronise a model (DDP, FSDP, DeepSpeed)?

Those wrappers act when the module they wrap is *called*: DDP prepares its gradient reduction there, FSDP gathers the
weights. A loss that reaches past the wrapper for the trunk and the head would train every process on its own
gradients, or on a shard of the weights. So the computation is run as the module's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


def run_as_forward(module: nn.Module, compute: Callable[..., Any], *args: Any) -> Any:
    """`compute(*args)`, run as one call of `module`: through its wrappers and with its hooks.

    `args`: one tensor at least, which DDP on a GPU insists on. The result should hold its tensors in tuples or dicts, where
    the wrappers find them. FSDP would round them to its compute format on the way out: there the result is what `compute`
    returned. The module's own forward is back in place afterwards, also after an error.
    """
    inner = unwrapped(module)
    before, computed = vars(inner).get("forward"), []

    def forward(*given: Any) -> Any:
        computed.append(compute(*given))
        return computed[0]

    inner.forward = forward
    try:
        returned = module(*args)
        return computed[0] if isinstance(module, FSDPModule) else returned
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


@contextmanager
def entered_below(module: nn.Module, inner: nn.Module) -> Iterator[None]:
    """For a while `inner` is called, which lies inside `module` (a PEFT model's base, for example).

    FSDP gathers the weights that belong to no layer when the outermost module is called; here that is done by hand, on every
    process at once.
    """
    if inner is module or not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that keep it as `.module` (DDP, DeepSpeed's engine); PEFT models stay as they are."""
    inner: Any = module
    while isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "get_input_embeddings"):
        inner = inner.module
    return inner
