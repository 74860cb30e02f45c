"""Counts from `config.json` against the parameters of the models that transformers and PEFT build (on the meta device)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_CHOICE
from transformers import AutoConfig, AutoModelForCausalLM

from aligntune.config.base import LoraSettings
from aligntune.errors import ModelError
from aligntune.planning.shapes import FAMILIES, Shape, read_shape, shape_of

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def built(kind: str, folder: Path, **changes: Any) -> tuple[Any, Shape]:
    """The model that transformers makes, and the shape read from the config that it saves."""
    config = AutoConfig.for_model(kind, **((GPT2_SIZES if kind == "gpt2" else SIZES) | changes))
    config.save_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), read_shape(str(folder))


def trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_and_adapters(kind: str, tied: bool, tmp_path: Path) -> None:
    model, shape = built(kind, tmp_path, tie_word_embeddings=tied)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    if tied:
        return
    for rank, targets in ((4, "all-linear"), (9, list(dict.fromkeys(FAMILIES[kind].names))[:1]), (5, None)):
        wanted = targets if targets is not None else PEFT_CHOICE.get(kind, "all-linear")
        with torch.device("meta"):
            adapted = get_peft_model(
                AutoModelForCausalLM.from_config(model.config),
                LoraConfig(r=rank, target_modules=wanted, task_type="CAUSAL_LM"),
            )
        assert shape.adapter_parameters(LoraSettings(rank, 8, 0.0, targets, False)) == trained(adapted)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24}, {"num_key_value_heads": 4}]
)
def test_switches_of_llama(changes: dict[str, Any], tmp_path: Path) -> None:
    model, shape = built("llama", tmp_path, **changes)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_pattern_of_targets(tmp_path: Path) -> None:
    model, shape = built("llama", tmp_path)
    pattern = r".*self_attn\.[qo]_proj"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=pattern, task_type="CAUSAL_LM"))
    assert shape.adapter_parameters(LoraSettings(4, 8, 0.0, pattern, True)) == trained(adapted)


def test_a_real_size_by_hand() -> None:
    """Qwen2.5-0.5B: 494,032,768 parameters, as its model card counts them."""
    config = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
              "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
    assert shape_of(config, "qwen").parameters == 494_032_768


def test_what_cannot_be_planned_says_what_to_do(tmp_path: Path) -> None:
    for content, message in (
        ('{"model_type": "mixtral"}', "model_type is 'mixtral'; formulas exist for llama, "),
        ("{}", "has no model_type"),
        ("not json", "cannot be read as JSON"),
        ("[]", "holds no settings by name"),
        ('{"model_type": "llama"}', "no whole number under hidden_size"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelError, match=message):
            read_shape(str(tmp_path))
    with pytest.raises(ModelError, match=r"hf download nobody/nothing config\.json"):
        read_shape("nobody/nothing")
    with pytest.raises(ModelError, match="no such folder"):
        read_shape("./nowhere")
    _, shape = built("llama", tmp_path)
    with pytest.raises(ModelError, match="has no w_proj; its linear layers are q_proj"):
        shape.targets(LoraSettings(4, 8, 0.0, ["w_proj"], True))


def test_an_adapter_has_the_shape_of_its_base(tmp_path: Path) -> None:
    _, shape = built("llama", tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    )
    assert read_shape(str(tmp_path / "adapter")).parameters == shape.parameters
