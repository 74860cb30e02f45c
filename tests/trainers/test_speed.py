"""Settings that make a run fast or small: compiled layers and split optimisers train as the plain ones do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from aligntune.config import compiling as rules
from aligntune.config.resolve import resolve
from aligntune.core.backend_factory import create_rl_trainer, create_sft_trainer
from aligntune.errors import AlignTuneError, ConfigError
from aligntune.models import precision
from aligntune.models.kernels import compile as kernels
from aligntune.optim.split_adamw import SplitAdamW
from aligntune.trainers import compiling
from comparing import without_timing


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "train.jsonl", tiny.chats(32))
    tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}"} for word in tiny.WORDS])
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile that runs the function as it is, and the functions it was given."""
    given: list[Any] = []
    kernels._compiled_for_training.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: given.append(function) or function)
    yield given
    kernels._compiled_for_training.cache_clear()


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_is_fast", lambda _: True)


def sft(files: Path, name: str, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "model_name": files / "model", "dataset_name": files / "train.jsonl", "output_dir": files / name, "precision": "fp32", "batch_size": 4,
        "learning_rate": 3e-3, "max_steps": 6, "log_interval": 1, "save_interval": 3, "loggers": "none", "backend": "native",
        "evaluation": {"max_new_tokens": 4}, "gradient_checkpointing": False,
    }  # fmt: skip
    return create_sft_trainer(**(given | settings))


def rows(session: Any) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (session.directory.path / "metrics.jsonl").read_text().splitlines()]
    return [without_timing(row) for row in found if row["split"] == "train"]


def losses(session: Any, **options: Any) -> list[float]:
    session.train(**options)
    return [row["loss"] for row in rows(session)]


@pytest.mark.parametrize(
    "settings",
    [{"compile": True}, {"selective_checkpointing": "half"}, {"compile": True, "gradient_checkpointing": True}],
    ids=str,
)
def test_compiled_layers_train_alike(files: Path, compiled: list[Any], settings: dict[str, Any]) -> None:
    plain = losses(sft(files, "plain"))
    assert not compiled
    session = sft(files, "compiled", **settings)
    assert losses(session) == pytest.approx(plain, abs=1e-5)
    assert len(compiled) == 1
    assert session.predict(["say red"])  # answers come from the plain layers


def test_a_gpu_compiles_unasked_what_earns_it(
    files: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "device", lambda: torch.device("cuda"))
    sft(files, "short").train()
    assert not compiled
    monkeypatch.setattr(rules, "EARNS", 6)
    sft(files, "long").train()
    assert len(compiled) == 1


def online(files: Path, name: str, **settings: Any) -> Any:
    return create_rl_trainer(
        files / "model", files / "prompts.jsonl", "grpo", backend="native", reward_functions=["length"], batch_size=8, num_generations=4,
        max_completion_length=6, logging_steps=1, loggers="none", output_dir=files / name, precision="fp32",
        **({"use_peft": False, "max_steps": 3} | settings),
    )  # fmt: skip


def test_online_rl_with_compiled_layers(files: Path, compiled: list[Any]) -> None:
    plain = losses(online(files, "plain"))
    assert losses(online(files, "compiled", compile=True)) == pytest.approx(plain, abs=1e-5)
    assert len(compiled) == 1


@pytest.mark.parametrize(("algorithm", "unasked"), [("grpo", True), ("ppo", True), ("meta_es", False), ("dpo", False)])
def test_which_algorithms_compile_unasked(algorithm: str, unasked: bool) -> None:
    given: dict[str, Any] = {"model": {"name_or_path": "m", "use_peft": False}, "dataset": "d"}
    given |= {"rewards": ["length"]} if algorithm != "dpo" else {}
    given |= {"train": {"verifier": "exact_match"}} if algorithm == "meta_es" else {}
    run = resolve(given, algorithm=algorithm).config
    assert (rules.compiling(run, lambda: 10**6) is not None) == unasked


def test_a_gpu_compiles_a_long_online_run_of_all_weights(
    files: Path, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(rules, "EARNS", 2)
    online(files, "short", max_steps=1).train()
    online(files, "lora", use_peft=True, lora_dropout=0.0).train()
    assert not compiled
    online(files, "long").train()
    assert len(compiled) == 1


@pytest.mark.parametrize("optimizer", ["adamw_split", "adamw_split_bf16"])
def test_split_weights_learn_as_float32_masters_do(files: Path, bf16: None, optimizer: str) -> None:
    masters = losses(sft(files, "masters", precision="bf16", max_steps=12))
    session = sft(files, "split", precision="bf16", optimizer=optimizer, max_steps=12)
    found = losses(session)
    assert session.model.dtype == torch.bfloat16
    inner = session.trainer.optimizer.optimizer
    assert isinstance(inner, SplitAdamW)
    moments = {state["exp_avg"].dtype for state in inner.state.values()}
    assert moments == {torch.bfloat16 if optimizer == "adamw_split_bf16" else torch.float32}
    assert found == pytest.approx(masters, abs=0.02)
    assert found[-1] < found[0] - 0.5


def test_a_split_run_resumes_exactly(files: Path, bf16: None) -> None:
    settings = {"precision": "bf16", "optimizer": "adamw_split_bf16"}
    whole = sft(files, "whole", **settings)
    want = losses(whole)
    again = sft(files, "whole", **settings)
    again.train(resume=str(whole.directory.checkpoints / "checkpoint-3"))
    assert [row["loss"] for row in rows(again)][-3:] == want[-3:]
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("settings", "message"), [
    ({"optimizer": "adamw_split", "use_peft": True}, "LoRA"),
    ({"optimizer": "adamw_split"}, "bf16"),
    ({"selective_checkpointing": "half", "compile": False}, "compile: false"),
    ({"selective_checkpointing": "half", "gradient_checkpointing": True}, "exclude each other"),
], ids=str)  # fmt: skip
def test_settings_that_contradict_are_refused(files: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sft(files, "out", **settings)


def test_dropout_and_selective_checkpointing_do_not_go_together(files: Path) -> None:
    session = sft(files, "out", selective_checkpointing="cheap", use_peft=True, lora_dropout=0.1)
    with pytest.raises(ConfigError, match="lora_dropout"):
        session.train()


def test_another_backend_gives_way(files: Path) -> None:
    with pytest.raises(AlignTuneError, match="adamw_split"):
        sft(files, "out", backend="trl", fallback=False, optimizer="adamw_split", precision="bf16")
    assert sft(files, "out", backend="auto", compile=True).backend == "native"
