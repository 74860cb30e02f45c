"""Unsloth in its own process: found without import, first there, compared, passed through, and nothing of it here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import trl

import tiny
from aligntune.api import create_trainer
from aligntune.backends import unsloth
from aligntune.backends.launch.supervise import search_path
from aligntune.backends.unsloth_worker import changed_arguments
from aligntune.config.resolve import resolve
from aligntune.errors import BackendError, ConfigError

FAKE = Path(__file__).parent / "fake"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for Unsloth, and a GPU as far as the probe is concerned."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setattr(unsloth, "has_gpu", lambda: True)
    invalidate_caches()


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.chats(8))
    return {
        "algorithm": "sft", "backend": "unsloth",
        "model": {"name_or_path": str(tmp_path / "model"), "peft_enabled": True, "lora_rank": 2, "max_seq_length": 128},
        "dataset": {"name": str(tmp_path / "rows.jsonl")},
        "train": {"per_device_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2},
        "logging": {"output_dir": str(tmp_path / "run"), "log_interval": 1, "loggers": "none"},
        "evaluation": {"max_new_tokens": 4},
    }  # fmt: skip


def refusal(config: dict[str, Any], **changes: Any) -> str | None:
    run = resolve(config | changes).config
    return unsloth.UnslothBackend().can_run(run)


def test_it_is_found_without_being_imported(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsloth.UnslothBackend().available() is None
    assert "unsloth" not in sys.modules
    monkeypatch.setattr(unsloth, "has_gpu", lambda: False)
    assert "needs a CUDA GPU" in (unsloth.UnslothBackend().available() or "")
    monkeypatch.setattr(unsloth, "_requirements", lambda name: ["trl<=1.15.0", "datasets<5; extra == 'colab'"])
    monkeypatch.setattr(unsloth, "installed", lambda name: "1.16.0")
    assert unsloth.clashes() == ["trl 1.16.0, it takes <=1.15.0"]


def test_absent_it_gives_way_with_its_reason(config: dict[str, Any]) -> None:
    trainer = create_trainer(config)
    assert trainer.backend == "native"
    assert trainer.reasons[0].startswith("unsloth: is not installed")
    with pytest.raises(BackendError, match="is not installed"):
        create_trainer(config | {"fallback": False})


@pytest.mark.parametrize(
    ("section", "setting", "value", "reason"),
    [
        ("model", "precision", "fp32", "not fp32"),
        ("model", "attn_implementation", "sdpa", "attention kernels itself"),
        ("model", "model_init_kwargs", {"revision": "x"}, "model_init_kwargs"),
        ("model", "device_map", {"": 0}, "places the model itself"),
        ("model", "quantization", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type"),
        ("train", "packing", True, "packed batch"),
        ("dataset", "processing_fn", lambda row: row, "cannot import"),
        ("launch", "launcher", "accelerate", "one process"),
    ],
)
def test_what_it_would_not_do_is_refused(
    config: dict[str, Any], section: str, setting: str, value: Any, reason: str
) -> None:
    assert refusal(config) is None
    assert reason in (refusal(config, **{section: config.get(section, {}) | {setting: value}}) or "")


def test_it_reads_no_adapter_on_an_adapter(config: dict[str, Any], tmp_path: Path) -> None:
    for name, base in (("one", "base"), ("two", f"base + {tmp_path / 'one'}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    given = config["model"]
    assert refusal(config, model=given | {"name_or_path": str(tmp_path / "one")}) is None
    reason = refusal(config, model=given | {"name_or_path": str(tmp_path / "two")})
    assert "no adapter that lies on another" in (reason or "")


@pytest.mark.parametrize("algorithm", ["gspo", "ppo", "neural_mirror_grpo", "meta_es"])
def test_algorithms_it_has_not_got(algorithm: str) -> None:
    run = {"algorithm": algorithm, "model": "m", "dataset": "d", "rewards": [{"type": "length"}]}
    if algorithm == "meta_es":
        run["train"] = {"verifier": "exact_match"}
    assert refusal(run) == unsloth.NOT_ON_IT[resolve(run).config.algorithm]


def test_a_run_passes_through_and_nothing_of_it_stays_here(
    installed: None, config: dict[str, Any], capsys: Any
) -> None:
    trainer, before = create_trainer(config), trl.SFTTrainer
    assert trainer.backend == "unsloth"
    metrics = trainer.train()
    said = capsys.readouterr().out
    assert "step 2/2" in said
    assert "adam_beta1=0.85 in place of 0.9" in said  # a default of TRL's that it changed: named
    assert metrics["train_loss"] > 0
    assert json.loads(trainer.directory.provenance.read_text())["backend"]["name"] == "unsloth"
    assert (trainer.directory.model / "adapter_model.safetensors").exists()
    assert len(trainer.predict(["say red"])) == 1
    assert trl.SFTTrainer is before
    assert "unsloth" not in sys.modules
    assert trl.SFTConfig.__name__ == "SFTConfig"
    with pytest.raises(ConfigError, match="already holds a run"):  # the child's error, as the class it was
        create_trainer(config).train()


def test_its_failures(installed: None, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_FAKE", "dies")
    with pytest.raises(BackendError, match="exit code 7"):
        create_trainer(config).train(overwrite=True)
    monkeypatch.setenv("UNSLOTH_FAKE", "fails")
    with pytest.raises(BackendError, match="importing unsloth failed with NotImplementedError"):
        create_trainer(config | {"fallback": False}).train(overwrite=True)
    trainer = create_trainer(config)
    trainer.train(overwrite=True)
    assert trainer.backend == "native"
    assert "importing unsloth failed" in trainer.reasons[0]


def test_a_setting_that_it_changes_is_an_error(config: dict[str, Any]) -> None:
    args = create_trainer(config | {"backend": "trl"}).build_trainer().args
    assert changed_arguments(args) == []
    args.adam_epsilon = 1e-5  # left to TRL: reported
    assert "adam_epsilon=1e-05 in place of 1e-08" in changed_arguments(args)[0]
    args.weight_decay = 0.125
    with pytest.raises(BackendError, match=r"weight_decay=0\.125 in place of"):
        changed_arguments(args)


def test_the_worker_refuses_to_come_second() -> None:
    code = "import transformers; from aligntune.backends.unsloth_worker import import_unsloth; import_unsloth()"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": search_path()}
    )
    assert "unsloth must be imported before transformers" in found.stderr
