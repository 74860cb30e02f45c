"""Which settings cannot act in this online run? Refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from aligntune.algorithms.base import AlgorithmSpec
from aligntune.config.enums import BackendType
from aligntune.errors import ConfigError, require
from aligntune.models.precision import device


def check_online(run: Any, spec: AlgorithmSpec) -> None:
    """ConfigError with everything that would be read and dropped."""
    problems = [*_reference(run, spec), *_models(run), *_rest(run)]
    if problems:
        raise ConfigError("\n".join(problems))


def _reference(run: Any, spec: AlgorithmSpec) -> Iterator[str]:
    model, train = run.model, run.train
    named = [name for name in ("ref_adapter_name", "model_adapter_name") if getattr(model, name) is not None]
    if named and not model.use_peft:
        yield f"model.{named[0]}: names a LoRA adapter; turn use_peft on"
    if not spec.needs(train).reference:
        given = [
            name
            for name in ("force_use_ref_model", "ref_model_init_kwargs", "ref_adapter_name")
            if getattr(model, name)
        ]
        yield from (f"model.{name}: this run compares with no reference (kl_coef is 0)" for name in given)
    if model.ref_adapter_name is not None:
        others = [name for name in ("force_use_ref_model", "ref_model_init_kwargs") if getattr(model, name)]
        others += ["sync_ref_model"] if train.sync_ref_model else []
        yield from (f"model.ref_adapter_name: and {name} name two references; keep one" for name in others)


def _models(run: Any) -> Iterator[str]:
    model = run.model
    has_reward_model = run.reward_training is not None or any(
        getattr(model, name) is not None for name in ("reward_path", "reward_model_name", "reward_model_source")
    )
    if not has_reward_model:
        for name in ("reward_device", "reward_model_quantization"):
            if model.is_set(name):
                yield f"model.{name}: there is no reward model (reward_path, reward_model_name, reward_model_source or reward_training)"
    if model.reward_device == "cuda" and not torch.cuda.is_available():
        yield "model.reward_device: is cuda, and this machine has no CUDA device; use auto or cpu"
    if model.reward_model_quantization:
        require("bitsandbytes", extra="quant", why="model.reward_model_quantization")
        if device().type == "cpu" or model.reward_device == "cpu":
            yield "model.reward_model_quantization: needs a GPU; leave it out on the CPU"
    if model.is_set("value_model_quantization") and not model.is_set("reward_value_model"):
        yield "model.value_model_quantization: the value head is on the policy's own base; give reward_value_model"
    if model.is_set("reward_value_loading_type"):
        if not has_reward_model and not model.is_set("reward_value_model"):
            yield "model.reward_value_loading_type: there is neither a reward model nor a value model"
        if model.reward_value_loading_type == "unsloth" and run.backend is not BackendType.UNSLOTH:
            yield "model.reward_value_loading_type: unsloth loads them under backend: unsloth only; use standard"


OWN_SETTING = {
    "num_generations": "num_generations",
    "max_new_tokens": "max_completion_length",
    "seed": "seed",
    "stop_token_ids": "stop_token",
    "do_sample": "temperature",
    "temperature": "temperature",
    "top_p": "top_p",
    "eos_token_id": "stop_token",
    "max_length": "max_completion_length",
    "num_return_sequences": "num_generations",
}


def _rest(run: Any) -> Iterator[str]:
    for name in run.train.generation_kwargs or {}:
        if name in OWN_SETTING:
            yield f"train.generation_kwargs.{name}: has a setting of its own, train.{OWN_SETTING[name]}; use that"
    if run.train.use_liger_loss:
        yield "train.use_liger_loss: log-probabilities are computed chunk by chunk without it already; leave it out"
    samples = run.logging.sample_logging
    if not samples.enabled:
        given = [name for name in samples.model_fields_set if name != "enabled"]
        yield from (f"logging.sample_logging.{name}: needs enabled: true" for name in sorted(given))
