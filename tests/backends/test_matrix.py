"""The matrix is computed from the backends' answers, without importing them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aligntune.backends import select
from aligntune.backends.matrix import answers, backends_page, chosen, matrix
from aligntune.config.enums import AlgorithmType
from aligntune.config.resolve import resolve
from aligntune.errors import BackendError


def test_every_algorithm_has_a_row_and_every_no_a_reason() -> None:
    found = matrix()
    assert set(found) == {member.value for member in AlgorithmType} | {"sft, classification"}
    assert [answer.backend for answer in found["ppo"]] == ["native", "trl", "unsloth"]
    assert found["ppo"][1].refusal == "PPO left TRL in 1.13"
    assert found["ppo"][0].refusal is None


def test_the_matrix_follows_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type(select.backends()[select.BackendType.NATIVE])
    run = resolve({"algorithm": "sft", "model": "m", "dataset": "d"}).config
    assert chosen(run) == "native"
    monkeypatch.setattr(backend, "can_run", lambda self, run: "is on holiday")
    assert chosen(run) == "trl"
    assert "is on holiday" in backends_page()
    assert answers(run)[1].reason == "is on holiday"
    with pytest.raises(BackendError, match="native: is on holiday"):
        select.choose(
            resolve({"algorithm": "sft", "model": "m", "dataset": "d", "backend": "native", "fallback": False}).config
        )


def test_two_backends_at_once_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"use_unsloth.*trl|trl.*use_unsloth"):
        resolve({"algorithm": "grpo", "model": {"name_or_path": "m", "use_unsloth": True}, "dataset": "d", "backend": "trl",
                 "rewards": [{"type": "length"}]})  # fmt: skip


def test_it_works_without_torch_trl_and_transformers() -> None:
    code = (
        "import sys, importlib.util\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'trl', 'unsloth', 'datasets'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name in ('torch', 'transformers', 'trl', 'unsloth') else real(name, package)\n"
        "sys.argv = ['aligntune', 'backends']\n"
        "from aligntune.cli.main import main\nmain()\n"
    )
    env = {"PYTHONPATH": str(Path(select.__file__).parents[2])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "trl      no: torch is not installed" in found.stdout, found.stderr
    assert "native   no: torch is not installed" in found.stdout


def test_unsloth_is_asked_last_for_online_algorithms() -> None:
    def asked(algorithm: str) -> list[str]:
        return [answer.backend for answer in matrix()[algorithm]]

    assert asked("sft") == asked("dpo") == ["unsloth", "native", "trl"]
    assert asked("grpo") == ["native", "trl", "unsloth"]
