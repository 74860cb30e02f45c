"""What is written of a model: where generation stops, nothing that is not whole, and the live model stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tiny
from aligntune.config.base import LoraSettings
from aligntune.errors import ModelError
from aligntune.models.lora import add_lora
from aligntune.models.save import merged, save_model, set_generation_tokens, set_weights

LORA = LoraSettings(4, 12, 0.25, ["q_proj", "embed_tokens"], True, bias="all")


def adapted() -> Any:
    model = add_lora(tiny.model(), LORA)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.mark.parametrize(("known", "ends"), [(None, 2), (2, 2), (5, [2, 5]), ([5, 6], [2, 5, 6]), ((5, 2), [5, 2])])
def test_generation_stops_at_the_tokenizers_end_as_well(known: Any, ends: Any) -> None:
    model = tiny.model()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = known, 9
    for _ in range(2):
        set_generation_tokens(model, tiny.tokenizer())
        assert model.generation_config.eos_token_id == ends
        assert model.generation_config.pad_token_id == 0


@pytest.mark.parametrize("samples", [True, False])
def test_sampling_settings_go_where_nothing_is_sampled(samples: bool) -> None:
    model = tiny.model()
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = samples, 0.7, 0.8, 9
    set_generation_tokens(model, tiny.tokenizer())
    assert (config.temperature, config.top_p, config.top_k) == ((0.7, 0.8, 9) if samples else (None, None, None))


def test_missing_weights_are_named_but_a_tied_head() -> None:
    model, whole = tiny.model(), tiny.model(seed=1).state_dict()
    part = {name: weight for name, weight in whole.items() if name not in ("model.norm.weight", "lm_head.weight")}
    with pytest.raises(ModelError, match=r"^there: has no weights for model\.norm\.weight$"):
        set_weights(model, part, "there")
    set_weights(model, part | {"model.norm.weight": whole["model.norm.weight"]}, "there")
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


def test_a_merged_copy_leaves_the_model_an_adapter(tmp_path: Path) -> None:
    model, ids = adapted(), torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    copy = merged(model)
    assert hasattr(model, "peft_config")
    assert not hasattr(copy, "peft_config")
    assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(copy(ids).logits, before, rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="cannot be merged"):
        save_model(model, tiny.tokenizer(), tmp_path, merge=True, state={})


def test_an_adapter_has_the_settings_that_were_given() -> None:
    config = adapted().peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 12, 0.25, "all")
    assert config.target_modules == {"q_proj", "embed_tokens"}


def test_an_adapters_folder_says_where_generation_stops(tmp_path: Path) -> None:
    model = adapted()
    model.generation_config.eos_token_id = 5
    save_model(model, tiny.tokenizer(), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]
