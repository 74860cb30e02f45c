"""Which settings of RL alignment exclude each other, or have no effect beside others?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from aligntune.config.algorithms import DAPOConfig, DPOConfig, GSPOConfig, MetaESConfig, NeuralMirrorConfig
from aligntune.config.applies import GROUP_RELATIVE
from aligntune.config.derive import reward_models
from aligntune.config.dpo_contradictions import dpo_contradictions
from aligntune.config.enums import AlgorithmType as A
from aligntune.config.enums import BackendType
from aligntune.config.run import RLRunConfig
from aligntune.config.synonyms import Path

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
"""What may not be among `generation_kwargs` -> the setting that says it."""


def rl_contradictions(config: RLRunConfig) -> Iterator[tuple[Path, str]]:
    train, model = config.train, config.model
    if train.is_set("ds3_gather_for_generation") and config.launch.strategy != "zero3":
        yield ("train", "ds3_gather_for_generation"), "needs launch.strategy: zero3 (DeepSpeed ZeRO-3)"
    if config.algorithm in GROUP_RELATIVE and train.num_generations == 1:
        yield ("train", "num_generations"), "is 1: a group of one has no relative advantage; use at least 2"
    given = reward_models(config)
    if len(given) > 1:
        yield ("model", given[1]), f"and {given[0]} both name a reward model; keep one"
    if config.algorithm is not A.DPO and not config.rewards and not given and config.reward_training is None:
        yield ("rewards",), "is empty and there is no reward model: give reward_functions, rewards or reward_model_name"
    if config.algorithm is A.DPO and config.rewards:
        yield ("rewards",), "DPO learns from preference pairs; it uses no reward functions"
    if model.is_set("use_logits_to_keep") and not model.use_logits_to_keep:
        yield (
            ("model", "use_logits_to_keep"),
            "cannot be turned off: logits are only ever computed where they are needed",
        )
    strategy = config.launch.strategy
    if train.is_set("vllm_gpu_memory_utilization") and not train.fast_inference:
        yield ("train", "vllm_gpu_memory_utilization"), "needs fast_inference: true"
    for name in ("ref_model_sync_steps", "ref_model_mixup_alpha"):
        if train.is_set(name) and not train.sync_ref_model:
            yield ("train", name), "needs sync_ref_model: true"
    yield from _without_reference(config)
    yield from _adapters(config)
    samples = config.logging.sample_logging
    for name in sorted(samples.model_fields_set - {"enabled"}):
        if not samples.enabled:
            yield ("logging", "sample_logging", name), "needs enabled: true"
    if train.sync_ref_model and (strategy == "zero3" or (strategy == "fsdp2" and model.use_peft)):
        yield (
            ("train", "sync_ref_model"),
            f"needs whole weights, which launch.strategy {strategy} does not keep; use ddp",
        )
    if train.reward_weights is not None and len(train.reward_weights) != len(config.rewards):
        yield (
            ("train", "reward_weights"),
            f"has {len(train.reward_weights)} entries for {len(config.rewards)} reward functions",
        )
    if train.use_liger_loss:
        yield (
            ("train", "use_liger_loss"),
            "has no effect: log-probabilities are computed chunk by chunk without it already; leave it out",
        )
    if isinstance(train, DAPOConfig) and train.overlong_buffer > train.max_completion_length:
        yield (
            ("train", "overlong_buffer"),
            f"is {train.overlong_buffer}, more than max_completion_length {train.max_completion_length}: every completion "
            "would be punished; it is the last part of that limit",
        )
    if isinstance(train, DPOConfig):
        yield from dpo_contradictions(config, train)
    else:
        yield from _online(config)
        yield from _rollouts(config)
    if isinstance(train, MetaESConfig):
        yield from _meta_es(config, train)


def _without_reference(config: RLRunConfig) -> Iterator[tuple[Path, str]]:
    """Settings of the reference, in a run that compares with none."""
    if config.has_reference:
        return
    why = "reference_free is true" if config.algorithm is A.DPO else "kl_coef is 0"
    for name in ("force_use_ref_model", "ref_model_init_kwargs", "ref_adapter_name"):
        if getattr(config.model, name):
            yield ("model", name), f"needs a reference: {why}"
    if config.train.sync_ref_model:
        yield ("train", "sync_ref_model"), f"needs a reference: {why}"
    if any(source.precompute_ref_log_probs for source in config.sources):
        yield ("dataset", "precompute_ref_log_probs"), f"needs a reference: {why}"


def _adapters(config: RLRunConfig) -> Iterator[tuple[Path, str]]:
    """Adapters by name, in a run that has none or beside another reference, and references that cannot move."""
    model, train = config.model, config.train
    for name in ("ref_adapter_name", "model_adapter_name"):
        if getattr(model, name) is not None and not model.use_peft:
            yield ("model", name), "needs use_peft: true: it names a LoRA adapter"
        if "." in (getattr(model, name) or ""):
            yield ("model", name), "cannot have a dot in it"
    if model.ref_adapter_name is not None:
        others = [name for name in ("force_use_ref_model", "ref_model_init_kwargs") if getattr(model, name)]
        for name in [*others, *(["sync_ref_model"] if train.sync_ref_model else [])]:
            yield ("model", "ref_adapter_name"), f"and {name} name two references; keep one"
        if model.ref_adapter_name == (model.model_adapter_name or "default"):
            yield ("model", "ref_adapter_name"), "is the name of the adapter that is trained; choose another"
    if train.sync_ref_model and model.quantization:
        yield ("train", "sync_ref_model"), "moves the reference's weights, which quantised ones cannot: turn one off"


def _rollouts(config: RLRunConfig) -> Iterator[tuple[Path, str]]:
    """Completions that do not fill optimiser steps or groups, or leave no room for a prompt."""
    train = config.train
    group = (train.num_generations or 1) if config.algorithm in GROUP_RELATIVE else 1
    micro, accumulation = train.per_device_batch_size, train.gradient_accumulation_steps
    step, completions = micro * accumulation, train.rollout_batch_size * group
    if train.is_set("rollout_batch_size"):
        if completions % step:
            yield (
                ("train", "rollout_batch_size"),
                f"{train.rollout_batch_size} prompts x {group} completions = {completions} do not fill whole optimiser steps of "
                f"{micro} x {accumulation} completions; choose a multiple of {step // math.gcd(step, group)}",
            )
    elif step % group:
        yield (
            ("train", "gradient_accumulation_steps"),
            f"{micro} x {accumulation} completions a step do not hold whole groups of {group}; choose a multiple of "
            f"{group // math.gcd(micro, group)}, or set rollout_batch_size",
        )
    if train.max_completion_length >= config.model.max_seq_length:
        yield (
            ("train", "max_completion_length"),
            f"is {train.max_completion_length}, which leaves no room for a prompt within model.max_seq_length {config.model.max_seq_length}",
        )


def _online(config: RLRunConfig) -> Iterator[tuple[Path, str]]:
    """Reward and value models, sampling."""
    model, train = config.model, config.train
    has_reward_model = config.reward_training is not None or bool(reward_models(config))
    for name in ("reward_device", "reward_model_quantization"):
        if model.is_set(name) and not has_reward_model:
            yield (
                ("model", name),
                "needs a reward model: reward_path, reward_model_name, reward_model_source or reward_training",
            )
    if model.is_set("value_model_quantization") and not model.is_set("reward_value_model"):
        yield (
            ("model", "value_model_quantization"),
            "needs reward_value_model: the value head is on the policy's own base",
        )
    if model.is_set("reward_value_loading_type"):
        if not has_reward_model and not model.is_set("reward_value_model"):
            yield ("model", "reward_value_loading_type"), "needs a reward model or a value model, and there is neither"
        if model.reward_value_loading_type == "unsloth" and config.backend is not BackendType.UNSLOTH:
            yield ("model", "reward_value_loading_type"), "unsloth needs backend: unsloth; use standard"
    for name in train.generation_kwargs or {}:
        if name in OWN_SETTING:
            yield (
                ("train", "generation_kwargs"),
                f"{name} has a setting of its own, train.{OWN_SETTING[name]}; use that",
            )


def _meta_es(config: RLRunConfig, train: MetaESConfig) -> Iterator[tuple[Path, str]]:
    if train.verifier is None and (train.target != "mirror" or len(config.rewards) != 1):
        yield (
            ("train", "verifier"),
            "is unset: name the reward that tells right from wrong (math_correctness, code_execution, your own); its score "
            "of held-out answers is the fitness, and it does not evolve",
        )
    if train.target != "rewards":
        if train.mirror_map != "neural":
            yield ("train", "mirror_map"), f"is {train.mirror_map}, and target {train.target} evolves the neural map"
        if train.mirror_coefficient == 0:
            yield (
                ("train", "mirror_coefficient"),
                f"is 0, so that nothing would depend on the map (target {train.target})",
            )
    if train.target == "mirror" and train.evolved_params:
        yield ("train", "evolved_params"), "needs target: rewards, or both"
    if train.is_set("eval_temperature") and train.eval_k == 1:
        yield ("train", "eval_temperature"), "needs eval_k above 1 (1 is greedy)"
    if config.launch.is_active:
        yield ("launch",), "Meta-ES starts its processes itself: leave launch out, and set train.num_workers"


def off_in_rl(config: RLRunConfig) -> list[tuple[bool, str, str]]:
    """(whether it is off, settings of it, message)."""
    train = config.train
    usual = train.default_of("kl_estimator")
    found = [(train.kl_coef == 0 and train.kl_estimator != usual, "kl_estimator", "needs kl_coef above 0")]
    if isinstance(train, DAPOConfig):
        found += [
            (not train.dynamic_sampling, "max_resample_batches", "needs dynamic_sampling: true"),
            (not train.overlong_buffer, "overlong_penalty", "needs overlong_buffer above 0"),
        ]
    if isinstance(train, NeuralMirrorConfig):
        found += [
            (not train.mirror_coefficient, "mirror_map mirror_path mirror_seed", "needs mirror_coefficient above 0"),
            (
                train.mirror_map != "neural",
                "mirror_path mirror_seed",
                f"is of mirror_map neural, not {train.mirror_map}",
            ),
            (train.mirror_path is not None, "mirror_seed", "draws a random map, and mirror_path names one: keep one"),
        ]
    if isinstance(train, GSPOConfig):
        left, right = train.is_set("gspo_gamma"), train.is_set("gspo_delta")
        upper = right or train.cliprange_high is not None
        found += [
            (right, "cliprange_high", "has no effect beside gspo_delta: keep one"),
            (left and upper, "cliprange", "has no effect beside gspo_gamma and an upper clip range: leave it out"),
        ]
    return found
