"""A saved adapter gives the same model again: with added tokens, and on top of another adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import tiny
from aligntune.config.base import LoraSettings
from aligntune.config.sft import ModelConfig
from aligntune.models.load import load_model, load_policy
from aligntune.models.lora import add_lora
from aligntune.models.precision import Precision
from aligntune.models.save import save_model
from aligntune.models.tokenizer import fit_embeddings, load_tokenizer

FP32 = Precision(torch.float32)
IDS = torch.tensor([[5, 6, 7, 8]])


def adapter(name: Path, folder: Path, pad_token: str | None = None) -> torch.Tensor:
    """Save a LoRA adapter with random weights; its logits."""
    tokenizer = load_tokenizer(str(name), pad_token=pad_token)
    model = load_policy(ModelConfig(name_or_path=str(name), peft_enabled=True), FP32, seed=0)
    fit_embeddings(model, tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    save_model(model, tokenizer, folder)
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def reloaded(folder: Path) -> torch.Tensor:
    return logits(load_model(ModelConfig(name_or_path=str(folder)), FP32, trained=False))


def test_an_adapter_with_an_added_token(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    before = adapter(base, tmp_path / "one", pad_token="<new>")
    assert before.shape[-1] == 260
    torch.testing.assert_close(reloaded(tmp_path / "one"), before, atol=1e-5, rtol=0)


def test_an_adapter_on_top_of_an_adapter(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    first = adapter(base, tmp_path / "one")
    second = adapter(tmp_path / "one", tmp_path / "two")
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(reloaded(tmp_path / "two"), second, atol=1e-4, rtol=0)


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_under_autocast_give_the_numbers_of_peft(autocast: bool) -> None:
    """Float32 adapters on a bfloat16 model: logits and gradients bit for bit, though no input is copied to float32."""
    settings = LoraSettings(4, 8, 0.0, ["q_proj", "down_proj"], True)
    ours = add_lora(tiny.model().to(torch.bfloat16), settings)
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        vars(module).pop("_cast_input_dtype", None)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(torch.arange(3, 23)[None]).logits
        logits.float().square().mean().backward()
        found.append((logits, [weight.grad for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert len(found[0][1]) == 2 * 2 * ours.config.num_hidden_layers
