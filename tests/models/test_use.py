"""A trained model in use: answers, and full weights out of an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from aligntune.config.base import LoraSettings
from aligntune.errors import ConfigError, ModelError
from aligntune.models.lora import add_lora
from aligntune.models.save import save_model
from aligntune.models.use import Chat, export, load_for_answers
from comparing import largest_difference


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A run's folder with an adapter that says something else than its base."""
    base = tiny.write_model(tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), LoraSettings(4, 8, 0.0, None, False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    save_model(model, tiny.tokenizer(), tmp_path / "run" / "model")
    return tmp_path / "run"


def test_exported_weights_are_the_adapter_in_its_base(adapter: Path, tmp_path: Path) -> None:
    assert export(str(adapter), tmp_path / "whole", dtype="fp32") < 1e-5
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    live, _ = load_for_answers(str(adapter))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.tensor([[5, 6, 7]])
    assert largest_difference(whole, live, ids) < 1e-5
    assert largest_difference(whole, base, ids) > 0.1
    with pytest.raises(ConfigError, match="exists"):
        export(str(adapter), tmp_path / "whole")
    assert 0 < export(str(adapter), tmp_path / "whole", dtype="bf16", overwrite=True) < 0.5


def test_chat_keeps_the_conversation(adapter: Path) -> None:
    talk = Chat.load(str(adapter), system="be brief", max_new_tokens=3)
    first = talk.say("hello")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert Chat.load(str(adapter), system="be brief", max_new_tokens=3).say("hello") == first  # greedy
    talk.say("again")
    assert len(talk.messages) == 5


@pytest.mark.parametrize("merged", [True, False])
def test_answers_of_an_adapter_end_where_its_tokenizer_says(tmp_path: Path, merged: bool) -> None:
    base = tiny.write_model(tmp_path / "base", eos_token_id=5)
    model = add_lora(AutoModelForCausalLM.from_pretrained(base), LoraSettings(4, 8, 0.0, None, False))
    model.save_pretrained(tmp_path / "checkpoint")
    tiny.tokenizer().save_pretrained(tmp_path / "checkpoint")
    found, tokenizer = load_for_answers(str(tmp_path / "checkpoint"), merged=merged)
    assert tokenizer.eos_token_id == 2
    assert found.generation_config.eos_token_id == [2, 5]


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        Chat.load(str(tmp_path / "nothing"))


def test_an_export_never_replaces_what_it_reads(adapter: Path) -> None:
    for output in (adapter, adapter / "model", adapter.parent):
        with pytest.raises(ConfigError, match="holds the model that is exported"):
            export(str(adapter), output, overwrite=True)
    assert (adapter / "model" / "adapter_config.json").exists()


def test_a_classifier_writes_no_text(tmp_path: Path) -> None:
    config = tiny.model().config
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="is a classifier"):
        Chat.load(str(tmp_path / "model"))
