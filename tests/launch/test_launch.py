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

from aligntune.api import create_trainer
from aligntune.backends.launch.supervise import search_path
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
    with pytest.raises(ConfigError, match="cannot import dataset.processing_fn"):
        create_trainer(config).train()
