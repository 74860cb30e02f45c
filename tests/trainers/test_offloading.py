"""Activations that wait in CPU memory train as those that stay: TRL's mover around our steps, and who refuses it."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from trl.models import activation_offloading as theirs

import tiny
from aligntune.backends.native import NativeBackend
from aligntune.core.backend_factory import create_sft_trainer
from aligntune.errors import ConfigError
from aligntune.trainers import arguments


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "train.jsonl", tiny.chats(16))
    tiny.write_rows(tmp_path / "eval.jsonl", tiny.chats(4, start=16))
    return tmp_path


def sft(files: Path, name: str, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "model_name": files / "model", "dataset_name": files / "train.jsonl", "eval_dataset": str(files / "eval.jsonl"), "output_dir": files / name,
        "precision": "fp32", "batch_size": 4, "learning_rate": 3e-3, "max_steps": 3, "log_interval": 1, "eval_interval": 2, "save_strategy": "no",
        "load_best_model_at_end": False, "loggers": "none", "backend": "native", "evaluation": {"max_new_tokens": 2, "compute_bleu": False},
    }  # fmt: skip
    return create_sft_trainer(**(given | settings))


def losses(session: Any) -> list[float]:
    rows = [json.loads(line) for line in (session.directory.path / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Size]]:
    """TRL's own mover for an accelerator that is this CPU, in one stream; the shapes that it moves, a list for each step."""
    steps: list[list[torch.Size]] = []

    class Watched(theirs.OffloadActivations):
        def __enter__(self) -> Any:
            steps.append([])
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            assert not self.tracker, "a step leaves nothing behind"
            return super().__exit__(*error)

    copy = torch.empty_like

    def empty_like(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        if options.pop("pin_memory", None) is not None:
            steps[-1].append(tensor.shape)
        return copy(tensor, **options)

    real = theirs.get_act_offloading_ctx_manager

    def on_cpu(model: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            return real(model, use_streams=False, use_pin_memory=False)

    monkeypatch.setattr(theirs, "OffloadActivations", Watched)
    monkeypatch.setattr(theirs, "get_act_offloading_ctx_manager", on_cpu)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(arguments, "_check_hardware", lambda run: None)
    return steps


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="older ones move from GPUs only")
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": False},
        {},
        {"gradient_checkpointing": False, "use_peft": True},
        {"loss_type": "dft"},
        {"batch_size": 8, "micro_batch_tokens": 200},
    ],
    ids=str,
)
def test_the_same_losses_with_activations_elsewhere(
    files: Path, moved: list[list[torch.Size]], settings: dict[str, Any]
) -> None:
    plain = sft(files, "plain", **settings)
    plain.train()
    assert not moved
    session = sft(files, "moved", **settings, activation_offloading=True)
    session.train()
    assert losses(session) == losses(plain)
    passes = 3 * (1 + ("micro_batch_tokens" in settings))  # 8 rows of 35 to 39 tokens are two pieces
    assert len(moved) == passes  # of training; evaluations and answers keep nothing to move
    for shapes in moved:
        hidden = [shape for shape in shapes if shape[-1] == 32 and shape.numel() > 1000]
        assert len(hidden) >= 2  # at least each layer's input
        assert not any(259 in shape for shape in shapes)  # nothing of the head, and no weight of it


@pytest.mark.adapter
def test_trl_still_has_it() -> None:
    assert "model" in inspect.signature(theirs.get_act_offloading_ctx_manager).parameters
    assert issubclass(theirs.OffloadActivations, torch.autograd.graph.saved_tensors_hooks)


def test_it_needs_a_gpu(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.activation_offloading: needs a GPU"):
        sft(files, "out", activation_offloading=True).train()


@pytest.mark.parametrize("settings", [{"compile": True}, {"selective_checkpointing": "half"}], ids=str)
def test_it_excludes_compiled_layers(files: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"activation_offloading: and model\.{next(iter(settings))}"):
        sft(files, "out", activation_offloading=True, **settings)


def test_layers_are_left_uncompiled_for_it(
    files: Path, moved: list[list[torch.Size]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        sft(files, "out", activation_offloading=True).build_trainer()
    assert "decoder layers are not compiled: activations are offloaded" in caplog.text


def test_native_takes_it_but_for_shards(files: Path) -> None:
    session = sft(files, "out", activation_offloading=True, backend="auto")
    assert session.backend == "native"
    run = session.config.model_copy(deep=True)
    run.launch.strategy = "fsdp2"
    assert "sharded weights" in str(NativeBackend().can_run(run))
