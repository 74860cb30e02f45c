"""How does a run read a checkpoint of a run that split the model otherwise (one copy per process, FSDP2)?

Weights lie in a checkpoint as a model folder, or as shards. Optimiser state lies there in one of three layouts: numbered by
place in the optimiser (one copy per process), or named by weight, whole or in shards (FSDP, by accelerate's state dict type).
All are read by `torch.distributed.checkpoint`, which cuts them as this run needs them.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from aligntune.errors import ConfigError
from aligntune.models.save import load_weights, own_weights, set_weights
from aligntune.trainers.parallel import is_sharded

LAYOUTS = {"numbered": "optimizer.pt", "named": "optimizer.bin", "shards": "optimizer_0"}
"""What each layout of optimiser state is called in a checkpoint."""
WEIGHT_SHARDS = "pytorch_model_fsdp_0"
"""Folder in a checkpoint with the weights in shards."""


def read_any_layout(trainer: Any, checkpoint: Path) -> None:
    """Make `trainer.train(resume_from_checkpoint=checkpoint)` read `checkpoint`, whatever its layout is.

    A trainer reads its own layout by itself, and is left alone then; its methods are replaced on the instance else.
    Raises `ConfigError` where the layouts differ and FSDP 1 is in use.
    """
    own, written = layout_of(trainer), layout_in(checkpoint)
    if trainer.is_deepspeed_enabled or written in (own, None):
        return
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ConfigError(
            f"{checkpoint} was written under another way of splitting the model, which FSDP 1 cannot read: "
            "resume it as the run that wrote it was started, or with fsdp_version: 2"
        )
    read_best = trainer._load_best_model
    trainer._load_from_checkpoint = lambda folder, model=None: read_weights(
        trainer.model if model is None else model, Path(folder)
    )
    trainer._load_optimizer_and_scheduler = partial(read_optimizer, trainer)

    def load_best_model() -> None:
        best = Path(trainer.state.best_model_checkpoint)
        if layout_in(best) == own:
            read_best()
        else:
            read_weights(trainer.model, best)

    trainer._load_best_model = load_best_model


def layout_of(trainer: Any) -> str:
    """The layout of the optimiser state that this run writes."""
    if not trainer.is_fsdp_enabled:
        return "numbered"
    return "named" if "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type) else "shards"


def layout_in(checkpoint: Path) -> str | None:
    """The layout of the optimiser state in `checkpoint`; None without any."""
    return next((layout for layout, name in LAYOUTS.items() if (checkpoint / name).exists()), None)


def read_weights(model: Any, checkpoint: Path) -> None:
    """The weights in `checkpoint` into `model`, whole or sharded. Every process must call it."""
    shards = checkpoint / WEIGHT_SHARDS
    if not shards.exists():
        load_weights(model, checkpoint)
        return
    state = {"model": own_weights(model)}
    _read_shards(state, shards, alone=not is_sharded(model))
    set_weights(model, state["model"], str(shards))


def read_optimizer(trainer: Any, checkpoint: str | Path) -> None:
    """The states of optimiser and scheduler in `checkpoint` into those of `trainer`, once its model is wrapped."""
    model, optimizer = trainer.model_wrapped, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    layout, folder, sharded = layout_in(Path(checkpoint)), Path(checkpoint), is_sharded(trainer.model)
    assert layout is not None
    own: dict[str, Any] = get_optimizer_state_dict(model, optimizer)  # with zeros where no step was made yet
    groups = [list(group["params"]) for group in own["param_groups"]]
    if layout == "shards":
        _read_shards({"optimizer": own}, folder / LAYOUTS[layout], alone=not sharded)
        found = own
    else:
        found = torch.load(folder / LAYOUTS[layout], map_location="cpu", weights_only=True)
    if layout == "numbered":
        found = named(found, groups)
    if {name for group in found["param_groups"] for name in group["params"]} != set().union(*groups):
        raise ConfigError(f"{checkpoint}: its run trained other weights than this one; resume it with the same model")
    whole = sharded and layout != "shards"
    set_optimizer_state_dict(model, optimizer, found, options=StateDictOptions(full_state_dict=whole, strict=False))
    trainer.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def named(state: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """An optimiser's numbered state by the names of its weights; `groups`: the names of each group, in the optimiser's order."""
    if [len(group["params"]) for group in state["param_groups"]] != [len(names) for names in groups]:
        raise ConfigError(
            "the run of the checkpoint trained other weights than this one; resume it with the same model"
        )
    names = {
        number: name
        for group, own in zip(state["param_groups"], groups, strict=True)
        for number, name in zip(group["params"], own, strict=True)
    }
    return {
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": [group | {"params": own} for group, own in zip(state["param_groups"], groups, strict=True)],
    }


def _read_shards(state: dict[str, Any], folder: Path, *, alone: bool) -> None:
    """Into the tensors of `state`; `alone`: this process reads all of them, without the others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)
