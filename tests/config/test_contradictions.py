"""What settings alone decide is refused before a row or a model is there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from aligntune.config.resolve import resolve
from aligntune.errors import ConfigError


def refused(algorithm: str, message: str, **settings: Any) -> None:
    tree = {"model": "nowhere", "dataset": {"name": "nowhere.jsonl"}} | (
        {} if algorithm == "dpo" else {"rewards": ["length"]}
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(tree, algorithm=algorithm, arguments=settings)


@pytest.mark.parametrize(("settings", "message"), [
    ({"kl_coef": 0.1}, "DPO's strength is beta"),
    ({"loss_type": "exo_pair"}, "train.label_smoothing: is 0, and exo_pair needs it above 0; the paper uses 1e-3"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "train.label_smoothing: has no effect on hinge; it is for aot, "),
    ({"loss_type": "sft", "label_smoothing": 0.1}, "train.label_smoothing: has no effect on sft"),
    ({"loss_type": "kto", "f_divergence_type": "forward_kl"}, "train.f_divergence_type: forward_kl is for losses of the margin; kto look"),
    ({"loss_type": "sft", "f_divergence_type": "forward_kl"}, "train.f_divergence_type: has no effect on the sft loss"),
    ({"f_alpha_divergence_coef": 0.5}, "train.f_alpha_divergence_coef: needs f_divergence_type: alpha_divergence"),
    ({"discopop_tau": 0.1}, "train.discopop_tau: needs loss_type: discopop"),
    ({"loss_type": "aot", "use_weighting": True}, "train.use_weighting: is for losses of single pairs; aot match answers"),
    ({"loss_type": "sft", "use_weighting": True}, "train.use_weighting: has no effect on the sft loss"),
    ({"loss_type": "hinge", "loss_weights": {"sigmoid": 1.0}}, "train.loss_type: is hinge, which is not among loss_weights"),
    ({"loss_weights": {"sigmoyd": 1.0}}, "train.loss_weights: there is no DPO loss 'sigmoyd'"),
    ({"loss_weights": {"sigmoid": 0.0, "sft": 0.0}}, "train.loss_weights: are all 0"),
    ({"beta": 0.0}, "train.beta: is 0"),
    ({"reference_free": True, "sync_ref_model": True}, "train.sync_ref_model: needs a reference: reference_free is true"),
    ({"reference_free": True, "force_use_ref_model": True}, "model.force_use_ref_model: needs a reference"),
    ({"reference_free": True, "precompute_ref_log_probs": True}, "dataset.precompute_ref_log_probs: needs a reference: "),
    ({"ref_adapter_name": "a", "sync_ref_model": True}, "model.ref_adapter_name: and sync_ref_model name two references"),
    ({"ref_adapter_name": "a", "model_adapter_name": "a"}, "model.ref_adapter_name: is the name of the adapter that is trained"),
    ({"ref_adapter_name": "default"}, "model.ref_adapter_name: is the name of the adapter that is trained"),
    ({"model_adapter_name": "a.b"}, "model.model_adapter_name: cannot have a dot in it"),
    ({"model_adapter_name": "a", "use_peft": False}, "model.model_adapter_name: needs use_peft: true"),
    ({"sync_ref_model": True, "quantization": {"load_in_4bit": True}}, "train.sync_ref_model: moves the reference's weights"),
    ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "dataset.precompute_ref_log_probs: needs a reference that stays"),
    ({"precompute_ref_batch_size": 2}, "dataset.precompute_ref_batch_size: needs precompute_ref_log_probs: true"),
    ({"dpo_eval_enabled": True, "eval_split": "train"}, "dpo_few_shot_examples_text"),
    ({"dpo_eval_enabled": True, "dpo_few_shot_max_samples": 0}, "train.dpo_eval_enabled: needs held-out pairs: give eval_dataset"),
    ({"dpo_zero_shot_max_samples": 3}, "train.dpo_zero_shot_max_samples: needs dpo_eval_enabled: true"),
    ({"use_liger_loss": True}, "train.use_liger_loss: has no effect"),
    ({"use_peft": False, "model_adapter_name": "a"}, "model.model_adapter_name: needs use_peft: true"),
    ({"use_peft": False, "ref_adapter_name": "a"}, "model.ref_adapter_name: needs use_peft: true"),
    ({"ref_adapter_name": "a", "force_use_ref_model": True}, "model.ref_adapter_name: and force_use_ref_model name two references"),
    ({"logging": {"sample_logging": {"num_samples": 2}}}, "logging.sample_logging.num_samples: needs enabled: true"),
], ids=str)  # fmt: skip
def test_dpo(settings: dict[str, Any], message: str) -> None:
    refused("dpo", message, **settings)


@pytest.mark.parametrize(("algorithm", "settings", "message"), [
    ("grpo", {"kl_coef": 0.0, "force_use_ref_model": True}, "model.force_use_ref_model: needs a reference: kl_coef is 0"),
    ("grpo", {"kl_coef": 0.0, "sync_ref_model": True}, "train.sync_ref_model: needs a reference: kl_coef is 0"),
    ("grpo", {"use_peft": False, "model_adapter_name": "a"}, "model.model_adapter_name: needs use_peft: true"),
    ("grpo", {"ref_adapter_name": "a", "force_use_ref_model": True}, "model.ref_adapter_name: and force_use_ref_model name two references"),
    ("grpo", {"reward_device": "cpu"}, "model.reward_device: needs a reward model"),
    ("grpo", {"reward_value_loading_type": "standard"}, "needs a reward model or a value model, and there is neither"),
    ("grpo", {"reward_path": "r", "reward_value_loading_type": "unsloth"}, "unsloth needs backend: unsloth; use standard"),
    ("ppo", {"value_model_quantization": {"load_in_8bit": True}}, "model.value_model_quantization: needs reward_value_model"),
    ("grpo", {"rollout_batch_size": 3, "num_generations": 4, "batch_size": 8}, "train.rollout_batch_size: 3 prompts x 4 completions = 12 do not fill whole optimiser steps of 8 x 1 completions; choose a multiple of 2"),
    ("ppo", {"rollout_batch_size": 3, "batch_size": 2}, "train.rollout_batch_size: 3 prompts x 1 completions = 3 do not fill"),
    ("grpo", {"num_generations": 4, "batch_size": 3, "gradient_accumulation_steps": 2}, "train.gradient_accumulation_steps: 3 x 2 completions a step do not hold whole groups of 4; choose a multiple of 4"),
    ("grpo", {"max_completion_length": 64, "max_seq_length": 64}, "train.max_completion_length: is 64, which leaves no room for a prompt"),
    ("grpo", {"generation_kwargs": {"max_new_tokens": 3}}, "max_new_tokens has a setting of its own, train.max_completion_length"),
    ("grpo", {"generation_kwargs": {"do_sample": False}}, "train.temperature"),
    ("grpo", {"generation_kwargs": {"temperature": 0.0}}, "train.temperature"),
    ("grpo", {"generation_kwargs": {"top_p": 0.5}}, "train.top_p"),
    ("grpo", {"use_liger_loss": True}, "train.use_liger_loss: has no effect"),
    ("grpo", {"logging": {"sample_logging": {"num_samples": 2}}}, "logging.sample_logging.num_samples: needs enabled: true"),
], ids=str)  # fmt: skip
def test_online(algorithm: str, settings: dict[str, Any], message: str) -> None:
    refused(algorithm, message, **settings)
