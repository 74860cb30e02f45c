"""An adapter that was trained on top of another is, wherever it was written, the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import tiny
from aligntune.config.rl import ModelConfig
from aligntune.core.backend_factory import create_rl_trainer, create_sft_trainer
from aligntune.errors import ModelError
from aligntune.models.load import load_model, load_policy
from aligntune.models.precision import Precision
from aligntune.models.save import save_model
from aligntune.models.tokenizer import load_tokenizer
from aligntune.models.use import export, load_for_answers
from aligntune.planning.shapes import read_shape

FP32 = Precision(torch.float32)
IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def loaded(name: Path, **settings: Any) -> torch.Tensor:
    return logits(load_model(ModelConfig(name_or_path=str(name), **settings), FP32, trained=False))


def policy(name: Path, pad_token: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """A policy under a new adapter, its adapters random, and the tokenizer."""
    tokenizer = load_tokenizer(str(name), pad_token=pad_token)
    config = ModelConfig(name_or_path=str(name), use_peft=True, **settings)
    model = load_policy(config, FP32, seed=0, tokenizer=tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.3)
    return model, tokenizer


def layer(name: Path, folder: Path, pad_token: str | None = None, **settings: Any) -> torch.Tensor:
    """Put a random adapter on `name`, and write it as a trainer writes a checkpoint; its logits."""
    model, tokenizer = policy(name, pad_token, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("stacked") / "base")


@pytest.mark.parametrize("tokens", [(None, None), ("<new>", None), (None, "<new>"), ("<new>", "<newer>")], ids=str)
def test_three_adapters_by_every_door(base: Path, tmp_path: Path, tokens: tuple[str | None, str | None]) -> None:
    layer(base, tmp_path / "one", tokens[0])
    two = layer(tmp_path / "one", tmp_path / "two")
    three = layer(tmp_path / "two", tmp_path / "three", tokens[1])
    for name, token in zip(("one", "two", "three"), (tokens[0], None, tokens[1]), strict=True):
        kept = load_file(tmp_path / name / "adapter_model.safetensors")
        assert any("embed_tokens" in key for key in kept) == (token is not None)
    assert three.shape[-1] == 259 + sum(token is not None for token in tokens)
    assert (two[..., :259] - three[..., :259]).abs().max() > 0.1
    torch.testing.assert_close(loaded(tmp_path / "three"), three, atol=1e-4, rtol=0)
    for merged in (True, False):
        model, _ = load_for_answers(str(tmp_path / "three"), torch.float32, merged=merged)
        torch.testing.assert_close(logits(model), three, atol=1e-4, rtol=0)
    assert export(str(tmp_path / "three"), tmp_path / "whole", dtype="fp32") < 1e-4
    torch.testing.assert_close(loaded(tmp_path / "whole"), three, atol=1e-4, rtol=0)
    assert read_shape(str(tmp_path / "three")).layers == 2


def test_others_do_not_read_the_upper_adapter_alone(base: Path, tmp_path: Path) -> None:
    layer(base, tmp_path / "one")
    layer(tmp_path / "one", tmp_path / "two")
    with pytest.raises(OSError, match=r"base \+ .*one"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "two")


def test_an_adapter_below_that_is_gone(base: Path, tmp_path: Path) -> None:
    layer(base, tmp_path / "one")
    two = layer(tmp_path / "one", tmp_path / "two")
    shutil.move(tmp_path / "one", tmp_path / "moved")
    with pytest.raises(ModelError, match=r"two: lies on the adapter .*one, which is not there; put it back, or write"):
        loaded(tmp_path / "two")
    file = tmp_path / "two" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "one"), str(tmp_path / "moved")))
    torch.testing.assert_close(loaded(tmp_path / "two"), two, atol=1e-4, rtol=0)


def test_a_base_whose_name_looks_like_several(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "one + two")
    logits = layer(tmp_path / "one + two", tmp_path / "three")
    torch.testing.assert_close(loaded(tmp_path / "three"), logits, atol=1e-5, rtol=0)


def test_an_adapter_as_sft_path_lies_on_the_model_that_the_run_names(base: Path, tmp_path: Path) -> None:
    layer(base, tmp_path / "one")
    other = tiny.write_model(tmp_path / "other", seed=1)
    two = layer(other, tmp_path / "two", sft_path=str(tmp_path / "one"))
    torch.testing.assert_close(loaded(tmp_path / "two"), two, atol=1e-4, rtol=0)
    three = layer(base, tmp_path / "three", sft_path=str(tmp_path / "two"))
    assert (three - two).abs().max() > 0.1
    torch.testing.assert_close(loaded(tmp_path / "three"), three, atol=1e-4, rtol=0)


def test_an_adapter_that_is_read_by_name_lies_on_the_model_that_the_run_names(base: Path, tmp_path: Path) -> None:
    layer(base, tmp_path / "start" / "policy")
    other = tiny.write_model(tmp_path / "other", seed=1)
    names = {"sft_path": str(tmp_path / "start"), "model_adapter_name": "policy", "ref_adapter_name": "reference"}
    two = layer(other, tmp_path / "two", **names)
    torch.testing.assert_close(loaded(tmp_path / "two"), two, atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]], ids=str)
@pytest.mark.parametrize("name", ["policy", "model"])
def test_a_reference_adapter_begins_as_the_one_that_is_trained(
    base: Path, tmp_path: Path, name: str, targets: list[str]
) -> None:
    start = layer(base, tmp_path / "start" / name, lora_target_modules=targets)
    config = ModelConfig(
        name_or_path=str(base), sft_path=str(tmp_path / "start"), model_adapter_name=name, ref_adapter_name="frozen", lora_target_modules=targets,
    )  # fmt: skip
    model = load_policy(config, FP32, seed=0)
    torch.testing.assert_close(logits(model), start, atol=1e-5, rtol=0)
    model.set_adapter("frozen")
    torch.testing.assert_close(logits(model), start, atol=1e-5, rtol=0)


def test_a_sharded_model_is_written_on_what_it_lies_on(base: Path, tmp_path: Path) -> None:
    layer(base, tmp_path / "one")
    model, tokenizer = policy(tmp_path / "one")
    save_model(model, tokenizer, tmp_path / "two", state=model.state_dict())
    assert not (tmp_path / "two" / "config.json").exists()
    torch.testing.assert_close(loaded(tmp_path / "two"), logits(model), atol=1e-4, rtol=0)


# Whole runs -------------------------------------------------------------------------------------------------------------


def answered(completion: str) -> float:
    return float(len(completion))


@pytest.fixture(scope="module")
def first(base: Path) -> Path:
    """The folder of a run that left an adapter."""
    tiny.write_rows(base.parent / "chats.jsonl", tiny.chats(16))
    pairs = [{"prompt": f"say {word}", "chosen": word, "rejected": word[::-1]} for word in tiny.WORDS]
    tiny.write_rows(base.parent / "pairs.jsonl", pairs)
    run(base.parent, base, "sft", base.parent / "first").train()
    return base.parent / "first"


def run(data: Path, name: Path, algorithm: str, out: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "batch_size": 8, "learning_rate": 0.1, "max_steps": 4, "loggers": "none", "lora_dropout": 0.0, "fallback": False,
        "backend": "native", "use_peft": True, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    if algorithm == "sft":
        given |= {"peft_enabled": given.pop("use_peft"), "evaluation": {"max_new_tokens": 2}}
        return create_sft_trainer(name, data / "chats.jsonl", output_dir=out, **(given | settings))
    if algorithm == "grpo":
        given |= {"num_generations": 4, "max_completion_length": 4, "top_p": 1.0, "reward_functions": [answered]}
    return create_rl_trainer(name, data / "pairs.jsonl", algorithm, output_dir=out, **(given | settings))


@pytest.mark.parametrize("backend", ["native", "trl"])
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_a_checkpoint_of_a_run_on_an_adapter_is_the_model_of_its_step(
    first: Path, tmp_path: Path, algorithm: str, backend: str
) -> None:
    start = loaded(first / "model")
    session = run(first.parent, first / "model", algorithm, tmp_path / "second", backend=backend)
    session.train()
    live = logits(session.model)
    assert (live - start).abs().max() > 0.01
    for folder in ("model", "checkpoints/checkpoint-4"):
        torch.testing.assert_close(loaded(tmp_path / "second" / folder), live, atol=1e-4, rtol=0)


def test_a_run_goes_on_from_such_a_checkpoint(first: Path, tmp_path: Path) -> None:
    run(first.parent, first / "model", "sft", tmp_path / "second", max_steps=2).train()
    upper = tmp_path / "second" / "checkpoints" / "checkpoint-2"
    session = run(first.parent, upper, "dpo", tmp_path / "third", max_steps=2)
    torch.testing.assert_close(logits(session.model), loaded(tmp_path / "second" / "model"), atol=1e-4, rtol=0)
    session.train()
    checkpoint = tmp_path / "third" / "checkpoints" / "checkpoint-2"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"].count(" + ") == 2
    torch.testing.assert_close(loaded(checkpoint), logits(session.model), atol=1e-4, rtol=0)


def test_the_best_weights_of_a_named_adapter_are_kept_and_found_again(first: Path, tmp_path: Path) -> None:
    settings = {
        "model_adapter_name": "policy", "learning_rate": 0.3, "max_steps": 8, "eval_dataset": {"name": str(first.parent / "pairs.jsonl")},
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    session = run(first.parent, first.parent / "base", "dpo", tmp_path / "out", **settings)
    session.train()
    state = session.trainer.state
    assert state.best_global_step < 8
    assert session.trainer.evaluate()["eval_loss"] == pytest.approx(state.best_metric, abs=1e-6)
    best = tmp_path / "out" / "checkpoints" / f"checkpoint-{state.best_global_step}"
    torch.testing.assert_close(loaded(best), logits(session.model), atol=1e-4, rtol=0)
    again = run(first.parent, first.parent / "base", "dpo", tmp_path / "out", **settings)
    again.train(resume="auto")  # all steps are done
    torch.testing.assert_close(logits(again.model), logits(session.model), atol=0, rtol=0)
