"""Which command starts this run's processes, and which files does it read? Nothing is started here."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.config.launch import LaunchConfig
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import ConfigError

SEVERAL_MACHINES_PORT = 29500
FSDP2 = {
    "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_offload_params": False, "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_activation_checkpointing": False,
}  # fmt: skip


START = [sys.executable, "-m", "aligntune.backends.launch.starter"]


@dataclass(frozen=True)
class LaunchPlan:
    """`commands`: host -> command, this machine's first; `files`: what to write before, by path."""

    commands: dict[str, list[str]]
    files: dict[Path, str]

    def shown(self) -> str:
        """The commands as a shell takes them, one a line, for people."""
        lines = [(host, shlex.join(command)) for host, command in self.commands.items()]
        return "\n".join(line if len(lines) == 1 else f"[{host}] {line}" for host, line in lines)


def launch_plan(run: SFTRunConfig | RLRunConfig, worker: list[str], folder: Path, *, gpus: int) -> LaunchPlan:
    """How to start `worker` (arguments after the interpreter, e.g. `["-m", "package.module", "run.json"]`).

    `folder`: where the files go. `gpus`: accelerators visible on this machine. Raises `ConfigError` for what cannot be
    started here: more processes than GPUs, accelerate without GPUs, a port in use, a host list without this machine.
    """
    launch = run.launch
    processes = _processes(launch, gpus)
    if launch.launcher == "slurm":
        return _slurm(run, worker, folder, processes)
    hosts = _this_machine_first(launch.hosts)
    leader = launch.hosts[0] if len(launch.hosts) > 1 else "127.0.0.1"
    port = _port(launch, several=len(hosts) > 1, leading=hosts[0] == launch.hosts[0] if launch.hosts else True)
    commands, files = {}, {}
    for host in hosts:
        place = launch.hosts.index(host) if launch.hosts else 0
        if launch.launcher == "torchrun":
            commands[host] = _torchrun(processes, len(hosts), place, leader, port, worker)
        else:
            file = folder / ("accelerate.yaml" if len(hosts) == 1 else f"accelerate-{place}.yaml")
            files[file] = _yaml(accelerate_config(run, processes * len(hosts), len(hosts), place, leader, port))
            commands[host] = [*START, "accelerate.commands.launch", "--config_file", str(file), *worker]
    return LaunchPlan(commands, files)


def accelerate_config(
    run: SFTRunConfig | RLRunConfig, processes: int, machines: int, machine: int, leader: str, port: int
) -> dict[str, Any]:
    """accelerate's configuration file; `processes` counts those of all machines."""
    found: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU" if processes > 1 else "NO",
        "num_processes": processes, "num_machines": machines, "machine_rank": machine, "main_process_ip": leader,
        "main_process_port": port, "rdzv_backend": "static", "same_network": True, "mixed_precision": "no", "use_cpu": False,
        "dynamo_config": {}, "enable_cpu_affinity": False, "debug": False,
    }  # fmt: skip
    if run.launch.strategy == "fsdp2":
        found |= {"distributed_type": "FSDP", "fsdp_config": FSDP2}
    elif run.launch.strategy != "ddp":
        stage = int(run.launch.strategy[-1])
        found |= {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "zero_stage": stage, "gradient_accumulation_steps": run.train.gradient_accumulation_steps,
                "gradient_clipping": run.train.max_grad_norm, "offload_optimizer_device": "none",
                "offload_param_device": "none", "zero3_init_flag": False, "zero3_save_16bit_model": stage == 3,
            },
        }  # fmt: skip
    return found


def _processes(launch: LaunchConfig, gpus: int) -> int:
    """Processes on each machine."""
    if launch.launcher == "slurm" and launch.num_processes is not None:
        return launch.num_processes
    if launch.launcher == "accelerate" and not gpus:
        raise ConfigError(
            "launch.launcher: accelerate needs GPUs here (it starts CPU processes through MPI only): use launcher: torchrun"
        )
    if launch.num_processes is None:
        if not gpus:
            raise ConfigError("launch.num_processes: this machine has no GPU to count; say how many CPU processes")
        return gpus
    if gpus and launch.num_processes > gpus:
        raise ConfigError(f"launch.num_processes: is {launch.num_processes}, but this machine shows {gpus} GPUs")
    return launch.num_processes


def _this_machine_first(hosts: list[str]) -> list[str]:
    if len(hosts) <= 1:
        return hosts or ["localhost"]
    names = {socket.gethostname(), socket.gethostname().split(".")[0], socket.getfqdn(), "localhost", "127.0.0.1"}
    here = next((host for host in hosts if host in names or _is_local(host)), None)
    if here is None:
        raise ConfigError(
            f"launch.hosts: this machine ({socket.gethostname()}) is not in {', '.join(hosts)}; start it on one of them"
        )
    return [here, *(host for host in hosts if host != here)]


def _is_local(host: str) -> bool:
    """Whether an address of `host` is one that this machine can listen on."""
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _port(launch: LaunchConfig, *, several: bool, leading: bool) -> int:
    wanted = launch.port if launch.port is not None else SEVERAL_MACHINES_PORT if several else 0
    if not leading:
        return wanted
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError as error:
            advice = "choose another" if several else "choose another, or leave launch.port out to take a free one"
            raise ConfigError(f"launch.port: {wanted} is in use on this machine ({error.strerror}); {advice}") from None
        return int(probe.getsockname()[1])


def _torchrun(processes: int, machines: int, place: int, leader: str, port: int, worker: list[str]) -> list[str]:
    options = {
        "nproc-per-node": processes,
        "nnodes": machines,
        "node-rank": place,
        "master-addr": leader,
        "master-port": port,
    }
    return [
        *START,
        "torch.distributed.run",
        *(f"--{name}={value}" for name, value in options.items()),
        *worker,
    ]


def _slurm(run: SFTRunConfig | RLRunConfig, worker: list[str], folder: Path, processes: int) -> LaunchPlan:
    launch = run.launch
    port = launch.port or SEVERAL_MACHINES_PORT
    config = accelerate_config(run, processes * launch.nodes, launch.nodes, 0, "127.0.0.1", port)
    script, accelerate = folder / "job.sbatch", folder / "accelerate.yaml"
    options = {"job-name": f"aligntune-{run.algorithm.value}", "nodes": launch.nodes, "ntasks-per-node": 1,
               "gpus-per-node": processes, "output": str(folder / "slurm-%j.log")} | launch.slurm  # fmt: skip
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate)]
    each = f"{shlex.join(start)} --machine_rank $SLURM_NODEID --main_process_ip $LEADER {shlex.join(worker)}"
    text = (
        "#!/bin/bash\n"
        + "".join(f"#SBATCH --{name}={value}\n" for name, value in options.items())
        + f'set -e\ncd {shlex.quote(str(Path.cwd()))}\nleader=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
        + f"export LEADER=$leader\nsrun --kill-on-bad-exit=1 bash -c {shlex.quote(each)}\n"
    )
    return LaunchPlan({"slurm": ["sbatch", str(script)]}, {accelerate: _yaml(config), script: text})


def _yaml(value: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False)
