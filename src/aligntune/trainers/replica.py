"""How does a policy that is sharded over processes speak? Through whole weights that the rollout engine can read at will.

Under FSDP2 every process keeps a whole copy for rollouts and takes over the policy's weights, device to device, before the
first rollout after a step. Under DeepSpeed ZeRO-3 the shards are gathered around each generation
(`ds3_gather_for_generation`), or, when that is off, layer by layer inside it. Elsewhere the engine reads the policy itself.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from aligntune.rollouts.base import RolloutEngine, Rollouts, SamplingParams

Selected = tuple[RolloutEngine, str]


def engine_of_sharded(model: nn.Module, select: Callable[[nn.Module], Selected], *, gather: bool = True) -> Selected:
    """`select(model)`, fit for a `model` that the launcher will shard. Call it before the trainer is built."""
    if _is_on("ACCELERATE_USE_FSDP"):
        replica = copy.deepcopy(model).requires_grad_(False).eval()
        engine, why = select(replica)
        return ReplicaEngine(engine, model, replica), f"{why}; on a whole copy of the sharded policy"
    if gather and _zero_stage() == 3:
        from aligntune.rollouts.transformers import TransformersEngine

        return GatheringEngine(TransformersEngine(model), model), "ZeRO-3 shards are gathered for it"
    return select(model)


def will_be_sharded() -> bool:
    """Whether the launcher asks for weights that are split over the processes (FSDP2, DeepSpeed ZeRO-3)."""
    return _is_on("ACCELERATE_USE_FSDP") or _zero_stage() == 3


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _zero_stage() -> int:
    """DeepSpeed's stage of sharding; 0 without DeepSpeed."""
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")) if _is_on("ACCELERATE_USE_DEEPSPEED") else 0


class ReplicaEngine:
    """An engine on `replica`, which `update_weights` makes equal to `policy`. Every process must update together."""

    def __init__(self, engine: RolloutEngine, policy: nn.Module, replica: nn.Module) -> None:
        self.engine, self.policy, self.replica, self.name = engine, policy, replica, engine.name

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        return self.engine.generate(prompt_ids, params)

    @torch.no_grad()
    def update_weights(self) -> None:
        """Gather one weight after another and copy it; those that are never trained are left out."""
        kept = dict(self.replica.named_parameters())
        for name, weight in self.policy.named_parameters():
            if weight.requires_grad:
                kept[name].copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        self.engine.update_weights()

    def release(self) -> None:
        """See `RolloutEngine`; the whole copy stays."""
        self.engine.release()


class GatheringEngine:
    """An engine that sees the whole weights of a ZeRO-3 model while it generates."""

    def __init__(self, engine: RolloutEngine, policy: nn.Module) -> None:
        self.engine, self.policy, self.name = engine, policy, engine.name

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.policy.parameters())):
            return self.engine.generate(prompt_ids, params)

    def update_weights(self) -> None:
        self.engine.update_weights()

    def release(self) -> None:
        self.engine.release()
