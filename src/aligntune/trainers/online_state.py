"""What must a checkpoint hold so that an online run goes on exactly, in the middle of a rollout too?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from aligntune.trainers.rollout import Rollout

if TYPE_CHECKING:
    from aligntune.trainers.online_trainer import OnlineTrainer

logger = logging.getLogger(__name__)

STATE = "rollouts.pt"
"""File in a checkpoint with the phase in progress, one for each process."""


class OnlineState(TrainerCallback):
    """Writes the trainer's own state beside every checkpoint."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write(collect(self.trainer), args, state.global_step)


def collect(trainer: OnlineTrainer) -> dict[str, Any]:
    """The rollout in progress, the place in the prompts, running means of rewards, critic and its optimiser, and a reference that moved."""
    unfinished = trainer.rollout is not None and trainer.done < trainer.plan.steps * trainer.plan.accumulation
    return {
        "phase": trainer.phase,
        "done": trainer.done,
        "order": trainer.order,
        "position": trainer.sampler.stream.position,
        "rollout": vars(trainer.rollout) if unfinished else None,
        "tokens": trainer.tokens,
        "rewards": trainer.sampler.rewards.state_dict(),
        "critic": None if trainer.critic is None else trainer.critic.state_dict(),
        "critic_optimizer": None if trainer.critic_updates is None else trainer.critic_updates.optimizer.state_dict(),
        "reference": {} if trainer.reference is None else trainer.reference.state_dict(),
    }


def write(collected: dict[str, Any], args: Any, step: int) -> None:
    """Lay what this process collected beside the checkpoint of `step`."""
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)  # another process may not have written its part yet
    torch.save(collected, folder / own_name(args))


def restore(trainer: OnlineTrainer, checkpoint: Path) -> None:
    """Continue from a checkpoint. Written by another number of processes, the rollout in progress is drawn anew."""
    files = sorted(checkpoint.glob(f"*{STATE}"))
    if not files:
        logger.warning("%s holds no %s: prompts begin again at the first", checkpoint, STATE)
        return
    whole = {file.name for file in files} == names(trainer.args.world_size)
    first = trainer.args.process_index == 0
    if whole:
        files = [checkpoint / own_name(trainer.args)]
    else:
        logger.warning("the number of processes changed: the rollout in progress is drawn anew")
    states = [
        torch.load(path, map_location="cpu", weights_only=True) for path in (files if whole or first else files[:1])
    ]
    state = states[0]
    trainer.phase, trainer.sampler.stream.position = state["phase"], state["position"]
    trainer.sampler.rewards.load_state_dict(state["rewards"])
    trainer.tokens = sum(each["tokens"] for each in states) if whole or first else 0
    if whole and state["rollout"] is not None:
        trainer.rollout, trainer.done, trainer.order = Rollout(**state["rollout"]), state["done"], state["order"]
    if trainer.critic is not None and trainer.critic_updates is not None:
        trainer.critic_updates.optimizer.load_state_dict(state["critic_optimizer"])
        trainer.critic.load_state_dict(state["critic"])
    if trainer.reference is not None:
        trainer.reference.load_state_dict(state["reference"])


def names(world: int) -> set[str]:
    """The files that `world` processes write into a checkpoint."""
    return {STATE} if world == 1 else {f"{rank}.{STATE}" for rank in range(world)}


def own_name(args: Any) -> str:
    """The file of this process."""
    return STATE if args.world_size == 1 else f"{args.process_index}.{STATE}"
