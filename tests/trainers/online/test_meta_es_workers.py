"""Meta-ES in several processes: the same to the bit, and what they cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
from es_helpers import Evolve, killed_after, same_runs

from aligntune.errors import ConfigError


def test_two_processes_equal_one_and_resume_exactly(
    evolve: Evolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"use_peft": True, "lora_r": 2, "target": "both", "mirror_coefficient": 1.0}
    evolve("one", **lora).train()
    killed_after(evolve("two", num_workers=2, **lora), 1, monkeypatch)
    evolve("two", **lora).train(resume="auto")  # in this process: another number of them is the same run
    same_runs(tmp_path / "one", tmp_path / "two")


def test_workers_need_importable_rewards(evolve: Evolve) -> None:
    with pytest.raises(ConfigError, match=r"num_workers: is 2.*cannot import.*num_workers to 1"):
        evolve(num_workers=2, verifier=lambda completion: 1.0).train()
