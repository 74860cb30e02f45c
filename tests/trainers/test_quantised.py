"""LoRA on a 4-bit base (QLoRA): both backends alike, the base untouched, and a model that others load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from aligntune.api import evaluate
from aligntune.config.base import LoraSettings
from aligntune.config.enums import PrecisionType
from aligntune.core.backend_factory import create_rl_trainer, create_sft_trainer
from aligntune.errors import ModelError
from aligntune.models.use import export, load_for_answers
from aligntune.rewards.model import load as load_reward_model
from aligntune.trainers.reward_model import RewardTraining, train_on_pairs

pytest.importorskip("bitsandbytes")
FOUR = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
BACKENDS = ["native", "trl"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    tiny.write_model(folder / "model", hidden_size=64, intermediate_size=128)
    tiny.write_rows(folder / "train.jsonl", tiny.chats(32))
    words = [{"prompt": f"say {word}", "answer": word, "chosen": word, "rejected": word[::-1]} for word in tiny.WORDS]
    tiny.write_rows(folder / "pairs.jsonl", words)
    return folder


def sft(files: Path, out: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "batch_size": 8, "learning_rate": 1e-2, "max_steps": 6, "log_interval": 1, "loggers": "none", "quantization": FOUR,
        "peft_enabled": True, "lora_dropout": 0.0, "evaluation": {"max_new_tokens": 4}, "fallback": False,
    }  # fmt: skip
    return create_sft_trainer(files / "model", files / "train.jsonl", output_dir=out, **(given | settings))


def digits(completion: str) -> float:
    return float(sum(letter.isdigit() for letter in completion))


def rl(files: Path, out: Path, algorithm: str, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "batch_size": 8, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "loggers": "none", "quantization": FOUR,
        "use_peft": True, "lora_dropout": 0.0, "fallback": False, "save_strategy": "no",
    }  # fmt: skip
    if algorithm == "grpo":
        given |= {"num_generations": 4, "max_completion_length": 6, "temperature": 1.0, "top_p": 1.0, "reward_functions": [digits],
                  "mask_truncated_completions": False}  # fmt: skip
    return create_rl_trainer(files / "model", files / "pairs.jsonl", algorithm, output_dir=out, **(given | settings))


def history(session: Any, *names: str) -> list[float]:
    session.train()
    return [entry[name] for entry in session.trainer.state.log_history for name in names if name in entry]


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_trl_and_native_train_alike(files: Path, tmp_path: Path, algorithm: str) -> None:
    """TRL would round the adapters to bfloat16."""
    make = sft if algorithm == "sft" else lambda *args, **more: rl(*args, algorithm, **more)
    native, trl = (
        history(make(files, tmp_path / backend, backend=backend), "loss", "grad_norm") for backend in BACKENDS
    )
    assert native == pytest.approx(trl, abs=2e-5)
    assert len(native) >= 8


def test_it_learns_and_the_base_stays(files: Path, tmp_path: Path) -> None:
    session = sft(files, tmp_path / "out", backend="native", max_steps=40)
    base = {name: weight.clone() for name, weight in session.model.named_parameters() if not weight.requires_grad}
    losses = history(session, "loss")
    assert losses[-1] < losses[0] - 0.3
    packed = [name for name, weight in base.items() if weight.dtype == torch.uint8]
    assert len(packed) >= 14
    after = dict(session.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in base.items())


def test_rollouts_are_those_of_the_quantised_policy(files: Path, tmp_path: Path) -> None:
    session = rl(files, tmp_path / "out", "grpo", backend="native")
    session.train()
    mismatch = [entry["sampler_mismatch"] for entry in session.trainer.state.log_history if "sampler_mismatch" in entry]
    assert max(mismatch) < 1e-5


def test_plain_peft_gives_the_same_logits(files: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    session = sft(files, tmp_path / "out", backend="native")
    session.train()
    four = BitsAndBytesConfig(**FOUR, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(files / "model", quantization_config=four, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "model").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, session.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def first(files: Path) -> Any:
    session = sft(files, files / "first", backend="native", eval_dataset=str(files / "train.jsonl"))
    session.train()
    return session


def test_an_adapter_is_not_merged_into_quantised_weights(files: Path, tmp_path: Path, first: Any) -> None:
    """Their rounding would swallow most of it."""
    again = create_sft_trainer(
        files / "first" / "model", files / "train.jsonl", output_dir=tmp_path / "second", quantization=FOUR, peft_enabled=True, loggers="none",
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"first/model: lies on a model that is quantised .*aligntune export"):
        again.train()
    with pytest.raises(ModelError, match="save its adapter, then aligntune export"):
        first.save_model(tmp_path / "merged", merge=True)


def test_adapters_below_are_not_merged_into_quantised_weights(files: Path, first: Any) -> None:
    upper = files / "upper"
    shutil.copytree(files / "first" / "model", upper)
    config = json.loads((upper / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"{files / 'model'} + {files / 'first' / 'model'}"
    (upper / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"upper: lies on a model that is quantised .*aligntune export"):
        evaluate(str(upper), str(files / "train.jsonl"), precision="fp32", quantization=FOUR, peft_enabled=True)


def test_an_evaluation_on_the_quantised_base_is_that_of_the_run(files: Path, first: Any) -> None:
    settings = {"precision": "fp32", "quantization": FOUR, "peft_enabled": True, "metrics": ["perplexity"]}
    found = evaluate(str(files / "first"), str(files / "train.jsonl"), **settings)
    assert found.metrics["loss"] == pytest.approx(first.metrics["eval_loss"], abs=1e-5)


def test_an_adapter_on_a_model_that_was_saved_quantised(files: Path, tmp_path: Path) -> None:
    four = BitsAndBytesConfig(**FOUR, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(files / "model", quantization_config=four, dtype=torch.float32).save_pretrained(tmp_path / "four")  # fmt: skip
    tiny.tokenizer().save_pretrained(tmp_path / "four")
    session = create_sft_trainer(
        tmp_path / "four", files / "train.jsonl", output_dir=tmp_path / "out", precision="fp32", max_steps=3, learning_rate=1e-2,
        peft_enabled=True, lora_dropout=0.0, loggers="none", evaluation={"max_new_tokens": 4},
    )  # fmt: skip
    session.train()
    assert export(str(tmp_path / "out"), tmp_path / "whole", dtype="fp32") < 1e-4
    asked, _ = load_for_answers(str(tmp_path / "out"), torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert "quantization_config" not in (tmp_path / "whole" / "config.json").read_text()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        live = session.model.eval()(ids).logits
        for model in (asked, whole):
            torch.testing.assert_close(model(ids).logits, live, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapts", [False, True])
def test_rewards_of_a_quantised_reward_model(files: Path, tmp_path: Path, adapts: bool) -> None:
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": word[::-1]} for word in tiny.WORDS]
    lora = LoraSettings(4, 8, 0.0, None, False) if adapts else None
    training = {"learning_rate": 1e-2, "epochs": 1, "precision": PrecisionType.FP32, "lora": lora}
    trained = train_on_pairs(rows, RewardTraining(str(files / "model"), str(tmp_path / "judge"), **training))
    asked, said = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    whole = torch.tensor(trained.model(asked, said))
    rounded = torch.tensor(load_reward_model(str(trained.folder), quantization=FOUR)(asked, said))
    assert torch.corrcoef(torch.stack([whole, rounded]))[0, 1] > 0.9
    assert (whole - rounded).abs().max() > 1e-6
    judged = {"reward_path": str(trained.folder), "reward_model_quantization": FOUR, "reward_functions": None}
    session = rl(files, tmp_path / "out", "grpo", backend="native", quantization={}, max_steps=1, **judged)
    assert history(session, "reward")
