"""The frozen reference beside a policy in training: no dropout reaches it, it leaves the policy as it was, and once moved it is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from aligntune.config.rl import ModelConfig
from aligntune.models.forward import runs_padded, use_padding
from aligntune.models.load import load_policy
from aligntune.models.packed import PackedRows
from aligntune.models.precision import Precision
from aligntune.models.tokenizer import load_tokenizer
from aligntune.trainers.reference import Reference

IDS, PROMPT = [5, 6, 7, 8, 9, 10], 2


def policy(dropout: float) -> Any:
    """Two adapters that say something, `learner` in training, with dropout inside attention and before the adapters."""
    base = tiny.model(attention_dropout=dropout)
    config = LoraConfig(r=2, lora_dropout=dropout, init_lora_weights=False, target_modules=["q_proj", "o_proj"])
    model = get_peft_model(base, config, adapter_name="learner")
    model.add_adapter("anchor", config)
    return model


def by_hand(model: Any, temperature: float) -> torch.Tensor:
    scores = model(torch.tensor([IDS])).logits[0, PROMPT - 1 : -1] / temperature
    return scores.log_softmax(-1)[torch.arange(len(IDS) - PROMPT), IDS[PROMPT:]]


@pytest.mark.parametrize("kind", ["copy", "disabled", "anchor"])
@torch.no_grad()
def test_dropout_of_the_policy_does_not_reach_it(kind: str) -> None:
    model = policy(0.5)
    rows = PackedRows.from_completions([IDS[:PROMPT]], [IDS[PROMPT:]])
    if kind == "disabled":
        with model.eval().disable_adapter():
            expected = by_hand(model, 2.0)
    else:
        model.set_adapter("anchor" if kind == "anchor" else "learner")
        expected = by_hand(model.eval(), 2.0)
        model.set_adapter("learner")
    reference = Reference(model, kind, "anchor" if kind == "anchor" else None)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(reference.log_probs(rows, 2.0), expected, rtol=0, atol=1e-5)
        assert all(module.training is training for module in model.modules())
        assert model.active_adapter == "learner"
    model.train()
    assert (by_hand(model, 2.0) - expected).abs().max() > 1e-3


def test_one_that_was_read_from_a_checkpoint_is_in_the_next() -> None:
    """Whether or not it is moved again in between."""
    reference = Reference(tiny.model(), "copy")
    assert reference.state_dict() == {}
    reference.load_state_dict({})
    assert reference.state_dict() == {}
    moved = tiny.model(seed=1).state_dict()
    reference.load_state_dict(moved)
    assert all(torch.equal(moved[name], weight) for name, weight in reference.state_dict().items())
    assert reference.state_dict().keys() == moved.keys()


@torch.no_grad()
def test_a_separate_one_follows_a_policy_whose_head_and_embedding_part(tmp_path: Path) -> None:
    """One weight is both in the base; with an adapter on the embedding alone and a new token they are two, of 260 rows.
    alpha 1: the policy itself."""
    base = str(tiny.write_model(tmp_path / "base"))
    config = ModelConfig(name_or_path=base, use_peft=True, lora_target_modules=["embed_tokens", "q_proj"])
    tokenizer, precision = load_tokenizer(base, pad_token="<new>"), Precision(torch.float32)
    learner = load_policy(config, precision, seed=0, tokenizer=tokenizer)
    for name, parameter in learner.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.3)
    use_padding(learner)
    settings = SimpleNamespace(model=config, train=SimpleNamespace(sync_ref_model=True))
    reference = Reference.build(SimpleNamespace(config=settings, precision=precision, tokenizer=tokenizer), learner)
    assert reference.mode == "copy"
    assert runs_padded(reference.model)
    reference.sync(learner, 1.0)
    rows = PackedRows.from_completions([IDS[:PROMPT]], [IDS[PROMPT:]])
    torch.testing.assert_close(reference.log_probs(rows), by_hand(learner.eval(), 1.0), rtol=0, atol=1e-5)
