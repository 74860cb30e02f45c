"""Two processes do what one does: the same losses, evaluations and weights, files from one of them, and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_cases
from safetensors.torch import load_file

from aligntune.api import create_trainer

EXACT = {"rel": 1e-5, "abs": 1e-5}


def losses(folder: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], row["split"]): row["loss"] for row in rows}


def gradients(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["grad_norm"] for row in rows if row["split"] == "train"]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(sft_config: Callable[..., dict[str, Any]], tmp_path: Path, sharded: bool) -> None:
    for backend in ("native", "trl"):
        create_trainer(sft_config(tmp_path / f"{backend}-1", backend=backend)).train()
    cases = [sft_config(tmp_path / f"{backend}-2", 2, backend) for backend in ("native", "trl")]
    continued = sft_config(tmp_path / "native-2", 2, max_steps=6)
    runs = [{"config": case, "sharded": sharded} for case in cases]
    run_cases([*runs, {"config": continued, "sharded": sharded, "train": {"resume": str(tmp_path / "native-2/checkpoints/checkpoint-2")}}], tmp_path)  # fmt: skip

    for backend in ("native", "trl"):
        one, two = tmp_path / f"{backend}-1", tmp_path / f"{backend}-2"
        expected, got = losses(one), losses(two)
        assert {key: got[key] for key in expected} == pytest.approx(expected, **EXACT)
        assert (two / "report.html").exists()
    for name, weight in weights(tmp_path / "trl-1").items():
        torch.testing.assert_close(weights(tmp_path / "trl-2")[name], weight, rtol=0, atol=1e-4)

    checkpoint = tmp_path / "native-2/checkpoints/checkpoint-4"
    again = create_trainer(sft_config(tmp_path / "native-2", max_steps=6))
    if sharded:
        with pytest.raises(ValueError, match=r"same launch\.strategy"):
            again.train(resume=str(checkpoint))
    else:  # one process continues what two began, and ends where the two ended
        expected = losses(tmp_path / "native-2")
        again.train(resume=str(checkpoint))
        assert losses(tmp_path / "native-2") == pytest.approx(expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_alignment_on_two_processes_equals_one(
    rl_config: Callable[..., dict[str, Any]], tmp_path: Path, sharded: bool
) -> None:
    """DPO and GRPO; GRPO's completions are told by their prompt, so that they are the same on any rank."""
    runs = [("dpo", "native"), ("dpo", "trl"), ("grpo", "native")] + ([] if sharded else [("grpo", "trl")])
    names = ["-".join(run) for run in runs]
    for world in (1, 2):
        cases = [
            rl_config(algorithm, tmp_path / f"{algorithm}-{backend}-{world}", world, backend)
            for algorithm, backend in runs
        ]
        run_cases([{"config": case, "sharded": sharded and world == 2} for case in cases], tmp_path, world)
    for name in names:
        one, two = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        assert losses(two) == pytest.approx(losses(one), **EXACT)
        assert gradients(two) == pytest.approx(gradients(one), rel=1e-4)
        assert max(gradients(one)) > 0.1
        trained = weights(two)
        for key, weight in weights(one).items():
            torch.testing.assert_close(trained[key], weight, rtol=0, atol=1e-4)
