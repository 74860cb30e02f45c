"""Short walks change nothing but the time they take."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from aligntune.trainers.native import NativeTrainer, listed


@pytest.fixture
def model() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes))


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))


def training(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_a_listed_model_walks_as_before(model):
    whole, own = list(model.parameters()), list(model.parameters(recurse=False))
    with listed(model):
        assert [id(weight) for weight in model.parameters()] == [id(weight) for weight in whole]
        assert list(model.parameters(recurse=False)) == own
        assert not any(training(model.eval()))
        assert all(training(model.train()))
        model.model.layers[0].eval()
        assert all(training(model.train()))
        whole[0].grad = torch.ones_like(whole[0])
        model.zero_grad()
        assert whole[0].grad is None
    assert not {"parameters", "train"} & set(vars(model))


def test_a_copy_of_a_listed_model_is_another_model(model):
    with listed(model):
        replica = copy.deepcopy(model)
        replica.eval().requires_grad_(False)
        assert not {id(weight) for weight in replica.parameters()} & {id(weight) for weight in model.parameters()}
    assert not any(training(replica))
    assert all(training(model))
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(weight.requires_grad for weight in replica.parameters())


def test_an_error_leaves_the_model_as_it_was(model):
    with pytest.raises(KeyboardInterrupt), listed(model):
        raise KeyboardInterrupt
    assert not {"parameters", "train"} & set(vars(model))


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "lora"])
def test_steps_equal_those_of_transformers(model, wrap, tmp_path, monkeypatch):
    """The same losses, gradient norms, weights and operation counts, with one walk for the training mode instead of one a step."""
    ids = torch.randint(16, (12, 5), generator=torch.Generator().manual_seed(0)).tolist()
    walks: Counter[str] = Counter()
    found = []
    start = wrap(model)
    start.eval()
    for cls in (Trainer, NativeTrainer):
        mine = copy.deepcopy(start)
        plain = type(mine).train

        def counted(self, mode=True, *, name=cls.__name__, plain=plain):
            walks[name] += 1
            return plain(self, mode)

        monkeypatch.setattr(type(mine), "train", counted)
        arguments = TrainingArguments(
            str(tmp_path / cls.__name__), max_steps=5, per_device_train_batch_size=2, logging_steps=1, learning_rate=0.1, use_cpu=True,
            report_to="none", save_strategy="no", max_grad_norm=0.5, disable_tqdm=True,
        )  # fmt: skip
        trainer = cls(mine, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
        trainer.train()
        rows = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
        weights = [weight.detach() for weight in mine.parameters()]
        found.append((rows, trainer.state.total_flos, weights))
        monkeypatch.setattr(type(mine), "train", plain)
    (rows, operations, weights), (our_rows, our_operations, our_weights) = found
    assert len(rows) == 5
    assert our_rows == rows
    assert our_operations == operations > 0
    assert all(torch.equal(one, other) for one, other in zip(weights, our_weights, strict=True))
    assert walks["NativeTrainer"] < walks["Trainer"] - 3


def test_gradients_lie_in_the_buckets_of_ddp(model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert NativeTrainer(model, arguments).accelerator.ddp_handler.gradient_as_bucket_view
    assert not Trainer(model, arguments).accelerator.ddp_handler.gradient_as_bucket_view
