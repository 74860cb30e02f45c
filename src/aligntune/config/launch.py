"""How many processes does a run have, on which machines, and who starts them?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from aligntune.config.base import Count, OneOf, Section, Settings

SHARDED = ("fsdp2", "zero3")
"""Strategies under which each process holds a part of the weights."""


class LaunchConfig(Section):
    """Several processes, started by one command; it is printed, and what it needs lies in `output_dir/launch`."""

    launcher: Annotated[str, OneOf("none", "accelerate", "torchrun", "slurm")] = "none"
    """Who starts the processes: `none` (this process is the run), `accelerate`, `torchrun` (strategy `ddp` only; also on
    CPUs), `slurm` (a batch script that starts accelerate on each node)."""
    strategy: Annotated[str, OneOf("ddp", "fsdp2", "zero2", "zero3")] = "ddp"
    """How the model lies on the processes: whole on each (`ddp`), sharded (`fsdp2`), or by DeepSpeed ZeRO-2 or ZeRO-3
    (extra `deepspeed`)."""
    num_processes: Count | None = None
    """Processes on each machine. Unset: one per visible GPU."""
    hosts: list[str] = []
    """Machines, the first of which leads; the others are reached by ssh, and see the same files. Unset: this machine."""
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of the leading process. Unset: a free one (several machines: 29500)."""
    nodes: Count = 1
    """SLURM: number of nodes."""
    slurm: Settings = {}
    """SLURM: options of the batch script by their long names, e.g. `{partition: gpu, time: "8:00:00"}`."""

    @property
    def is_active(self) -> bool:
        """Whether other processes than this one do the work."""
        return self.launcher != "none"


def launch_contradictions(launch: LaunchConfig) -> Iterator[tuple[str, str]]:
    """(setting, message) of launch settings that exclude each other or cannot act."""
    if not launch.is_active:
        for name in sorted(launch.model_fields_set - {"launcher"}):
            yield name, "has no effect without a launcher: set launch.launcher to accelerate, torchrun or slurm"
        return
    if launch.launcher == "torchrun" and launch.strategy != "ddp":
        yield "strategy", f"torchrun starts ddp runs; {launch.strategy} needs launch.launcher: accelerate"
    if launch.launcher == "slurm":
        if launch.hosts:
            yield "hosts", "SLURM chooses the machines: set launch.nodes"
        if launch.num_processes is None:
            yield "num_processes", "is needed with slurm: the GPUs of a node cannot be counted from here"
        return
    for name in sorted(launch.model_fields_set & {"nodes", "slurm"}):
        yield name, "is for launch.launcher: slurm; name machines by launch.hosts"
    if len(set(launch.hosts)) != len(launch.hosts):
        yield "hosts", "names a machine twice"
    if len(launch.hosts) > 1 and launch.num_processes is None:
        yield "num_processes", "is needed with several hosts: the GPUs of another machine cannot be counted from here"
