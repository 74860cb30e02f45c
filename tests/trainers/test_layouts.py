"""A checkpoint in another layout than the run's own gives the losses of the run that wrote it. (Two processes: `tests/launch`.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

import tiny
from aligntune.core.backend_factory import create_sft_trainer
from aligntune.errors import ConfigError
from aligntune.optim.split_adamw import SplitAdamW
from aligntune.trainers import layouts

LORA = {"use_peft": True, "lora_dropout": 0.3}
"""Dropout draws random numbers at every step."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "train.jsonl", tiny.chats(16))
    return folder


def trainer(files: Path, out: str, **settings: Any) -> Any:
    return create_sft_trainer(
        model_name=files / "model", dataset_name=files / "train.jsonl", eval_dataset={"name": str(files / "train.jsonl")},
        output_dir=files / out, backend="native", precision="fp32", batch_size=4, learning_rate=3e-3, max_steps=4,
        log_interval=1, eval_interval=2, save_interval=2, loggers="none",
        evaluation={"max_new_tokens": 4, "compute_rouge": False, "compute_bleu": False}, **settings,
    )  # fmt: skip


def losses(files: Path, out: str) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (files / out / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], row["split"]): row["loss"] for row in rows if "loss" in row and row["step"] > 2}


@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_shards_of_a_run_of_several_processes(files: Path, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    """As accelerate writes FSDP's SHARDED_STATE_DICT, by its own calls; the best weights so far lie there too."""
    checkpoint = files / f"whole-{len(settings)}" / "checkpoints" / "checkpoint-2"

    def with_shards(self: Any, model: Any, trial: Any) -> None:
        write(self, model, trial)
        if self.state.global_step == 2:
            state = get_peft_model_state_dict(model) if settings else get_model_state_dict(model)
            dcp.save({"model": state}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
            state = get_optimizer_state_dict(model, self.optimizer.optimizer)
            dcp.save({"optimizer": state}, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)

    from aligntune.trainers.packed_sft import PackedSFTTrainer

    write = PackedSFTTrainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(PackedSFTTrainer, "_save_checkpoint", with_shards)
        trainer(files, checkpoint.parts[-3], **settings).train()
    name = "adapter_model.safetensors" if settings else "model.safetensors"
    best = load_file(checkpoint / name)
    for gone in (name, "optimizer.pt"):
        (checkpoint / gone).unlink()
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["best_metric"] = 0.0  # nothing that follows is better
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))

    out = f"again-{len(settings)}"
    trainer(files, out, **settings).train(resume=str(checkpoint))
    assert losses(files, out) == losses(files, checkpoint.parts[-3])
    assert len(losses(files, out)) == 3
    kept = load_file(files / out / "model" / name)
    assert all(torch.equal(kept[key], weight) for key, weight in best.items())
    last = load_file(files / out / "checkpoints" / "checkpoint-4" / name)
    assert not all(torch.equal(last[key], weight) for key, weight in best.items())


def test_split_weights_keep_their_rest(tmp_path: Path) -> None:
    """AdamW on bfloat16 weights: what a named state holds beside the moments, bit for bit; and the next step is the same."""

    def made() -> tuple[torch.nn.Module, SplitAdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3).bfloat16()
        return model, SplitAdamW([{"params": [model.bias]}, {"params": [model.weight]}], lr=0.1, weight_decay=0.1)

    def step(model: torch.nn.Module, optimizer: SplitAdamW) -> None:
        model(torch.ones(1, 5, dtype=torch.bfloat16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = made()
    for _ in range(3):
        step(model, optimizer)
    torch.save(get_optimizer_state_dict(model, optimizer), tmp_path / "optimizer.bin")
    torch.save({}, tmp_path / "scheduler.pt")
    again, other = made()
    again.load_state_dict(model.state_dict())
    scheduler = SimpleNamespace(load_state_dict=lambda state: None)
    layouts.read_optimizer(
        SimpleNamespace(model=again, model_wrapped=again, optimizer=other, lr_scheduler=scheduler), tmp_path
    )
    assert other.state[again.weight]["rest"].any()
    for _ in range(2):
        step(model, optimizer)
        step(again, other)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(other.state[again.weight]["rest"], optimizer.state[model.weight]["rest"])


@pytest.mark.usefixtures("short_answers")
def test_another_model_is_refused(files: Path) -> None:
    trainer(files, "other").train()
    checkpoint = files / "other" / "checkpoints" / "checkpoint-2"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    names = [[f"weight.{number}" for number in group["params"]] for group in state["param_groups"]]
    torch.save(layouts.named(state, names), checkpoint / "optimizer.bin")
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match="other weights than this one"):
        trainer(files, "refused").train(resume=str(checkpoint))
    shutil.rmtree(files / "refused")


def test_numbers_become_names() -> None:
    """Two groups of an optimiser; the second weight had no gradient yet."""
    state = {"state": {0: "a", 2: "c"}, "param_groups": [{"lr": 1.0, "params": [0, 1]}, {"lr": 2.0, "params": [2]}]}
    assert layouts.named(state, [["x", "y"], ["z"]]) == {
        "state": {"x": "a", "z": "c"},
        "param_groups": [{"lr": 1.0, "params": ["x", "y"]}, {"lr": 2.0, "params": ["z"]}],
    }
    with pytest.raises(ConfigError, match="other weights"):
        layouts.named(state, [["x"], ["y", "z"]])
