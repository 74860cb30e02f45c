"""The real Unsloth: skipped where it, a GPU, or versions that it takes are missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from aligntune.backends.unsloth import UnslothBackend

ABSENT = UnslothBackend().available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ABSENT is not None, reason=f"unsloth {ABSENT}")]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A small Qwen2 (Unsloth patches architectures it knows) with head size 64, and chats."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(**shape, num_key_value_heads=2, eos_token_id=2, pad_token_id=0, bos_token_id=None)
    )
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.chats(64))
    pairs = [{"prompt": f"say {word}", "chosen": word, "rejected": word[::-1] * 2} for word in tiny.WORDS]
    tiny.write_rows(tmp_path / "pairs.jsonl", pairs)
    return {
        "backend": "unsloth", "fallback": False,
        "model": {"name_or_path": str(tmp_path / "model"), "max_seq_length": 256, "lora_dropout": 0.0},
        "train": {"max_steps": 20, "learning_rate": 1e-3, "per_device_batch_size": 8},
        "logging": {"output_dir": str(tmp_path / "run"), "loggers": "none"},
    }  # fmt: skip


def losses(trainer: Any) -> list[float]:
    rows = [json.loads(line) for line in trainer.directory.metrics.path.read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def sft(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    folder = Path(config["model"]["name_or_path"]).parent
    return config | {
        "algorithm": "sft", "dataset": {"name": str(folder / "rows.jsonl")}, "evaluation": {"max_new_tokens": 4},
        "model": config["model"] | {"peft_enabled": True, "lora_rank": 8, "gradient_checkpointing": False},
        "logging": config["logging"] | {"log_interval": 1, "save_strategy": "no"},
    } | changes  # fmt: skip


def test_sft_from_a_parent_that_holds_transformers(config: dict[str, Any]) -> None:
    import transformers  # noqa: F401

    from aligntune.api import create_trainer

    trainer = create_trainer(sft(config))
    assert trainer.backend == "unsloth"
    trainer.train()
    assert "unsloth" not in sys.modules
    ours = losses(trainer)
    assert ours[-1] < 0.93 * ours[0]
    assert (trainer.directory.model / "adapter_model.safetensors").exists()
    assert len(trainer.predict(["say red"])) == 1

    output = config["logging"]["output_dir"] + "-trl"
    theirs = create_trainer(
        sft(config, backend="trl", logging={"output_dir": output, "loggers": "none", "log_interval": 1})
    )
    theirs.train()
    assert ours == pytest.approx(losses(theirs), rel=0.05)


def test_four_bit_and_checkpointing(config: dict[str, Any]) -> None:
    from aligntune.api import create_trainer

    run = sft(config)
    run["model"] |= {"quantization": {"load_in_4bit": True}, "gradient_checkpointing": True}
    trainer = create_trainer(run)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_dpo(config: dict[str, Any]) -> None:
    from aligntune.api import create_trainer

    folder = Path(config["model"]["name_or_path"]).parent
    run = config | {"algorithm": "dpo", "dataset": {"name": str(folder / "pairs.jsonl")}}
    run["train"] = config["train"] | {
        "max_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "group_by_length": False,
    }
    trainer = create_trainer(run)
    trainer.train()
    assert len(losses(trainer)) == 5


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo"])
def test_the_grpo_family_learns(config: dict[str, Any], algorithm: str) -> None:
    """Answers of many characters are rewarded, and become longer by Unsloth's own loss on our rollouts."""
    from aligntune.api import create_trainer

    folder = Path(config["model"]["name_or_path"]).parent
    tiny.write_rows(folder / "prompts.jsonl", [{"prompt": f"say {word}"} for word in tiny.WORDS])
    run = config | {"algorithm": algorithm, "dataset": {"name": str(folder / "prompts.jsonl")}}
    run["model"] = {"name_or_path": config["model"]["name_or_path"], "use_peft": False, "max_seq_length": 128}
    run["rewards"] = [{"type": "length", "params": {"unit": "chars", "min_length": 60, "max_length": 1000}}]
    run["train"] = {
        "max_steps": 24, "learning_rate": 3e-3, "per_device_batch_size": 32, "num_generations": 8, "max_completion_length": 24, "kl_coef": 0.0,
        "temperature": 1.0, "top_p": 1.0, "logging_steps": 1, "save_strategy": "no", "group_by_length": False, "mask_truncated_completions": False,
    }  # fmt: skip
    if algorithm == "dapo":
        run["train"] |= {"dynamic_sampling": False}
    trainer = create_trainer(run)
    trainer.train()
    rows = [json.loads(line) for line in trainer.directory.metrics.path.read_text().splitlines()]
    rewards = [row["reward"] for row in rows if row["split"] == "train" and "reward" in row]
    assert len(rewards) == 24
    assert sum(rewards[-4:]) > 1.4 * sum(rewards[:4])  # 1.9 times by the native trainer
