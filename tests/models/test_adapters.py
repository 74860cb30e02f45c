"""A saved adapter gives the same model again: with added tokens, and on top of another adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from aligntune.config.base import LoraSettings
from aligntune.config.sft import ModelConfig
from aligntune.errors import ModelError
from aligntune.models.load import load_model, load_policy
from aligntune.models.lora import add_lora, lora_targets
from aligntune.models.precision import Precision
from aligntune.models.save import save_model
from aligntune.models.tokenizer import load_tokenizer
from aligntune.models.use import export

FP32 = Precision(torch.float32)
IDS = torch.tensor([[5, 6, 7, 8]])


def adapter(name: Path, folder: Path, pad_token: str | None = None, targets: list[str] | None = None) -> torch.Tensor:
    """Save a LoRA adapter with random weights; its logits."""
    tokenizer = load_tokenizer(str(name), pad_token=pad_token)
    config = ModelConfig(name_or_path=str(name), peft_enabled=True, target_modules=targets)
    model = load_policy(config, FP32, seed=0, tokenizer=tokenizer)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
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


@pytest.mark.parametrize("pad_token", [None, "<new>"])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]], ids=str)
def test_an_adapter_of_the_embedding_or_the_head_alone(
    tmp_path: Path, targets: list[str], pad_token: str | None
) -> None:
    """Of a model that uses one weight for both: merged, they are two, for whoever reads the files too."""
    base = tiny.write_model(tmp_path / "base", tie_word_embeddings=True)
    before = adapter(base, tmp_path / "one", pad_token, targets)
    torch.testing.assert_close(reloaded(tmp_path / "one"), before, atol=1e-4, rtol=0)
    assert export(str(tmp_path / "one"), tmp_path / "whole", dtype="fp32") < 1e-4
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert not whole.config.tie_word_embeddings
    torch.testing.assert_close(logits(whole), before, atol=1e-4, rtol=0)


def test_a_head_that_was_trained_whole_beside_an_adapter(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        model.get_base_model().lm_head.weight.normal_()
    before = logits(model)
    save_model(model, load_tokenizer(str(base)), tmp_path / "merged", merge=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not whole.config.tie_word_embeddings
    torch.testing.assert_close(logits(whole), before, atol=1e-5, rtol=0)


def write_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("harm", "said"), [
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 20), "damaged"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "damaged"),
    (lambda folder: write_config(folder, base_model_name_or_path=None), "does not say which model"),
    (lambda folder: write_config(folder, target_modules=["nope"]), "does not fit the model"),
    (lambda folder: write_config(folder, base_model_name_or_path=str(tiny.write_model(folder / "wide", hidden_size=64))), "does not fit"),
    (lambda folder: write_config(folder, base_model_name_or_path=str(tiny.write_model(folder / "deep", num_hidden_layers=3))), "does not fit"),
], ids=["none", "cut", "config", "base", "targets", "wide", "deep"])  # fmt: skip
def test_an_adapter_that_cannot_be_used(tmp_path: Path, harm: Any, said: str) -> None:
    adapter(tiny.write_model(tmp_path / "base"), tmp_path / "one")
    harm(tmp_path / "one")
    with pytest.raises(ModelError, match=said):
        reloaded(tmp_path / "one")


def test_an_adapter_without_weights_to_add(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        reloaded(tmp_path / "prompts")


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


@pytest.mark.parametrize(("wanted", "strict", "found"), [
    (None, False, ["q_proj", "v_proj"]), ("all-linear", True, "all-linear"), (["self_attn.o_proj", "lm_head"], True, ["self_attn.o_proj", "lm_head"]),
    (["q_proj", "c_attn"], False, ["q_proj", "v_proj"]), (["q_proj", "c_attn"], True, None), (["c_attn"], True, None),
])  # fmt: skip
def test_where_adapters_lie(wanted: Any, strict: bool, found: Any) -> None:
    lora = LoraSettings(2, 4, 0.0, wanted, strict)
    if found is None:
        with pytest.raises(ModelError, match="the model has no c_attn; its linear layers are down_proj, gate_proj, "):
            lora_targets(tiny.model(), lora)
    else:
        assert lora_targets(tiny.model(), lora) == found


def test_new_weights_follow_from_the_seed_and_a_new_head_trains(tmp_path: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny.write_model(tmp_path / "base")), peft_enabled=True)

    def trained(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(99 + seed)
        kind = AutoModelForSequenceClassification
        model = load_policy(config, FP32, seed=seed % 2, auto_class=kind, num_labels=3)
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}

    one, again, other = trained(0), trained(2), trained(1)
    (head,) = (name for name in one if "lora_" not in name)
    assert one[head].shape == (3, 32)
    assert all(torch.equal(weight, again[name]) for name, weight in one.items())
    assert not torch.equal(one[head], other[head])
    assert any(not torch.equal(weight, other[name]) for name, weight in one.items() if "lora_A" in name)


def test_a_merged_adapter_is_trained_further_in_full(tmp_path: Path) -> None:
    adapter(tiny.write_model(tmp_path / "base"), tmp_path / "one")
    model = load_policy(ModelConfig(name_or_path=str(tmp_path / "one")), FP32, seed=0)
    assert all(weight.requires_grad for weight in model.parameters())


def test_every_part_of_a_head_trains_beside_an_adapter() -> None:
    """ModernBERT's has two, of which PEFT by itself would train the last."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("modernbert", **sizes))
    adapted = add_lora(model, LoraSettings(2, 4, 0.0, ["Wqkv"], True), head=True)
    whole = {name.split(".")[2] for name, weight in adapted.named_parameters() if weight.requires_grad and "lora_" not in name}  # fmt: skip
    assert whole == {"head", "classifier"}
