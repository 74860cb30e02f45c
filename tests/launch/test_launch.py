"""A run in other processes: the same result, the errors of ranks, killed ranks, Ctrl-C, ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from aligntune.api import create_trainer
from aligntune.backends.launch import session as launch_session
from aligntune.backends.launch.job import Job
from aligntune.backends.launch.plan import LaunchPlan, launch_plan
from aligntune.config.resolve import resolve
from aligntune.errors import BackendError, ConfigError

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


@pytest.fixture
def train_instead(
    sft_config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Any]:
    """`train_instead(code)` starts two processes as any run, by torchrun and our worker, whose training is this code."""

    def start(code: str) -> None:
        (tmp_path / "worker.py").write_text(
            "import os, signal, sys, time\nfrom pathlib import Path\nimport torch\nfrom torch import distributed\n"
            "from aligntune.backends.launch import worker\nfrom aligntune.reporting import recording\n"
            "def train(job, backend=None):\n    distributed.init_process_group('gloo')\n    rank = distributed.get_rank()\n"
            f"    with recording(job.folder.parent, rank=rank, loggers='none'):\n        {code}\n"
            "worker.train = train\nraise SystemExit(worker.main())\n"
        )

        def plan_of_it(run: Any, worker: list[str], folder: Path, *, gpus: int) -> LaunchPlan:
            return launch_plan(run, [str(tmp_path / "worker.py"), worker[-1]], folder, gpus=gpus)

        monkeypatch.setattr(launch_session, "launch_plan", plan_of_it)
        try:
            create_trainer(sft_config(tmp_path / "run", 2) | {"launch": TWO}).train()
        finally:
            if Path("/proc").is_dir():
                assert _ranks(tmp_path / "run" / "launch" / "job.json") == []

    return start


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("raise OverflowError('a loss of 1e99')", r"(?s)rank 1 failed with OverflowError: a loss.*line \d+, in train"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9"),
    ],
    ids=["raises", "is killed"],
)
def test_a_rank_that_fails_stops_the_others(train_instead: Callable[[str], Any], end: str, message: str) -> None:
    """The first rank waits in a collective for the second, which ends."""
    with pytest.raises(BackendError, match=message):
        train_instead(
            f"distributed.barrier()\n        if rank == 1: {end}\n        distributed.all_reduce(torch.ones(1))"
        )


@pytest.mark.parametrize(("told", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_ctrl_c_and_kill_stop_all(
    train_instead: Callable[[str], Any], tmp_path: Path, told: signal.Signals, raised: type[BaseException]
) -> None:
    def interrupt() -> None:
        end = time.monotonic() + 120
        while not (tmp_path / "waits").exists() and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(os.getpid(), told)

    Thread(target=interrupt, daemon=True).start()
    with pytest.raises(raised):
        train_instead(
            f"distributed.barrier()\n        Path({str(tmp_path / 'waits')!r}).touch()\n        time.sleep(600)"
        )
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"


def test_an_error_of_the_run_is_not_lost_in_that_of_the_launcher(
    train_instead: Callable[[str], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="not that one"):
        train_instead(
            "distributed.barrier()\n        from aligntune.errors import ConfigError\n"
            "        if rank == 1: raise ConfigError('not that one')\n        distributed.all_reduce(torch.ones(1))"
        )
    said = "".join(capfd.readouterr())
    assert "aligntune.backends.launch.starter" in said
    assert "Traceback" not in said
    assert "ChildFailedError" not in said


def test_the_first_error_is_raised_as_its_own_class(tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert job.first_error() is None
    job.write_error(1, ConfigError("train.seed: not that one"))
    job.write_error(0, RuntimeError("the other one is gone"))
    error = job.first_error()
    assert type(error) is ConfigError
    assert str(error) == "train.seed: not that one"


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
    assert made.shown().endswith(f" accelerate.commands.launch --config_file {path} -m worker job.json")
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
    with pytest.raises(ConfigError, match=r"needs launch\.strategy: zero3"):
        resolve(run)
    assert not resolve(
        run | {"launch": {"launcher": "accelerate", "strategy": "zero3"}}
    ).config.train.ds3_gather_for_generation


def test_a_reference_that_follows_needs_whole_weights() -> None:
    run = {"algorithm": "dpo", "model": "m", "dataset": "d", "train": {"sync_ref_model": True}}
    launch = {"launcher": "accelerate", "strategy": "fsdp2"}
    with pytest.raises(ConfigError, match="sync_ref_model: needs whole weights"):
        resolve(run | {"launch": launch})  # LoRA is the default
    with pytest.raises(ConfigError, match="sync_ref_model: needs whole weights"):
        resolve(run | {"model": {"name_or_path": "m", "use_peft": False}, "launch": launch | {"strategy": "zero3"}})
    assert resolve(
        run | {"model": {"name_or_path": "m", "use_peft": False}, "launch": launch}
    ).config.train.sync_ref_model
