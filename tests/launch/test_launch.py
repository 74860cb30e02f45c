"""A run in other processes: the same result, the errors of ranks, killed ranks, Ctrl-C, ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from aligntune.api import create_trainer
from aligntune.backends.launch.plan import LaunchPlan, launch_plan
from aligntune.backends.launch.supervise import search_path
from aligntune.config.resolve import resolve
from aligntune.errors import ConfigError

TWO = {"launcher": "torchrun", "num_processes": 2}


def test_two_processes_by_torchrun(sft_config: Callable[..., dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    config = sft_config(tmp_path / "run", 2) | {"launch": TWO}
    trainer = create_trainer(config)
    assert "torch.distributed.run --nproc-per-node=2" in trainer.describe()
    metrics = trainer.train()
    said = capsys.readouterr().out
    assert said.count("step 4/4") == 1  # one rank speaks
    assert "-m aligntune.backends.launch.worker" in said
    assert metrics["eval_loss"] == pytest.approx(3.92752, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-4)  # the saved model, here
    assert len(trainer.predict(["say red"])) == 1
    assert (trainer.save_model(tmp_path / "copy") / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="already holds a run"):  # an error of the main rank, as its own class
        create_trainer(config).train()


@pytest.fixture
def started(sft_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Any:
    """A long run of two processes, started in the background from a parent of its own, with its ranks' pids."""
    config = sft_config(tmp_path / "run", 2, max_steps=100_000)
    config["logging"] |= {"eval_strategy": "no", "save_strategy": "no"}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config | {"launch": TWO}))
    code = (
        "import json, sys\nfrom aligntune.api import create_trainer\nfrom aligntune.errors import AlignTuneError\n"
        "try:\n    create_trainer(json.load(open(sys.argv[1]))).train()\n"
        "except AlignTuneError as error:\n    print('SAID', type(error).__name__, error)\n"
        "except KeyboardInterrupt:\n    print('INTERRUPTED')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": search_path()},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end and parent.poll() is None:
        time.sleep(0.1)
    yield parent, _ranks(tmp_path / "run" / "launch" / "job.json")
    parent.kill()
    parent.wait()


def _ranks(job: Path) -> list[int]:
    """Process ids whose command is the worker of `job`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(job).encode() in words and b"torch.distributed.run" not in words:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_dead_rank_or_ctrl_c_stops_all(started: Any, tmp_path: Path, end: signal.Signals) -> None:
    parent, ranks = started
    assert len(ranks) == 2, parent.communicate(timeout=30)[0] if parent.poll() is not None else ranks
    begin = time.monotonic()
    if end is signal.SIGKILL:
        os.kill(ranks[1], signal.SIGKILL)
    else:
        parent.send_signal(signal.SIGINT)
    output, _ = parent.communicate(timeout=30)
    assert time.monotonic() - begin < 30
    assert _ranks(tmp_path / "run" / "launch" / "job.json") == []
    if end is signal.SIGKILL:
        assert "SAID BackendError" in output
        assert "Signal 9" in output
    else:
        assert "INTERRUPTED" in output
        assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"


def test_a_port_in_use(sft_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"launch\.port: {port} is in use"):
            create_trainer(sft_config(tmp_path / "run", 2) | {"launch": TWO | {"port": port}}).train()


def test_a_function_that_another_process_cannot_import(
    sft_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = sft_config(tmp_path / "run", 2) | {"launch": TWO}
    config["dataset"] |= {"processing_fn": lambda row: row}
    with pytest.raises(ConfigError, match=r"cannot import dataset\.processing_fn"):
        create_trainer(config).train()


def plan(tmp_path: Path, gpus: int = 8, **launch: Any) -> LaunchPlan:
    run = resolve({"algorithm": "sft", "model": "m", "dataset": "d", "launch": launch}).config
    return launch_plan(run, ["-m", "worker", "job.json"], tmp_path, gpus=gpus)


@pytest.mark.parametrize(
    ("strategy", "kind", "section", "expected"),
    [
        ("ddp", "MULTI_GPU", None, None),
        ("fsdp2", "FSDP", "fsdp_config", {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ("zero2", "DEEPSPEED", "deepspeed_config", {"zero_stage": 2, "zero3_save_16bit_model": False}),
        ("zero3", "DEEPSPEED", "deepspeed_config", {"zero_stage": 3, "zero3_save_16bit_model": True}),
    ],
)
def test_what_accelerate_is_told(tmp_path: Path, strategy: str, kind: str, section: str | None, expected: Any) -> None:
    made = plan(tmp_path, launcher="accelerate", strategy=strategy)
    ((path, text),) = made.files.items()
    told = yaml.safe_load(text)
    assert told["distributed_type"] == kind
    assert told["num_processes"] == 8  # one per visible GPU
    if section is not None:
        assert expected.items() <= told[section].items()
    assert made.shown().endswith(f"-m accelerate.commands.launch --config_file {path} -m worker job.json")
    assert load_config_from_file(_saved(path, text)).num_processes == 8  # accelerate's own reader takes it


def _saved(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_several_machines(tmp_path: Path) -> None:
    made = plan(tmp_path, launcher="torchrun", num_processes=8, hosts=["other", "localhost"])
    assert list(made.commands) == ["localhost", "other"]  # this machine's first
    assert "--node-rank=1" in made.commands["localhost"]
    assert "--master-addr=other" in made.commands["localhost"]
    with pytest.raises(ConfigError, match="this machine"):
        plan(tmp_path, launcher="torchrun", num_processes=8, hosts=["host-a.invalid", "host-b.invalid"])
    made = plan(tmp_path, launcher="slurm", strategy="fsdp2", num_processes=4, nodes=2, slurm={"partition": "gpu"})
    script = next(text for path, text in made.files.items() if path.suffix == ".sbatch")
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --partition=gpu",
        "srun --kill-on-bad-exit=1",
    ):
        assert line in script
    assert "--machine_rank $SLURM_NODEID" in script


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use launcher: torchrun"):
        plan(tmp_path, gpus=0, launcher="accelerate", num_processes=2)
    with pytest.raises(ConfigError, match="shows 2 GPUs"):
        plan(tmp_path, gpus=2, launcher="torchrun", num_processes=3)
    with pytest.raises(ConfigError, match="no GPU to count"):
        plan(tmp_path, gpus=0, launcher="torchrun")
    for wrong in (
        {"strategy": "zero3"},
        {"launcher": "torchrun", "strategy": "fsdp2"},
        {"launcher": "accelerate", "nodes": 2},
    ):
        with pytest.raises(ConfigError, match=r"launch\."):
            plan(tmp_path, **wrong)


def test_gathering_is_refused_without_zero3() -> None:
    run = {
        "algorithm": "grpo",
        "model": "m",
        "dataset": "d",
        "rewards": [{"type": "length"}],
        "train": {"ds3_gather_for_generation": False},
    }
    with pytest.raises(ConfigError, match="ZeRO-3 only"):
        resolve(run)
    assert not resolve(
        run | {"launch": {"launcher": "accelerate", "strategy": "zero3"}}
    ).config.train.ds3_gather_for_generation
