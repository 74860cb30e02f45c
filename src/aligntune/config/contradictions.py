"""Which settings exclude each other, or have no effect beside others? Such a config is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aligntune.config.algorithms import DAPOConfig, GSPOConfig, MetaESConfig, NeuralMirrorConfig
from aligntune.config.applies import GROUP_RELATIVE
from aligntune.config.classification import classification_contradictions
from aligntune.config.derive import reward_models
from aligntune.config.enums import LOGGERS, SPLIT_OPTIMIZERS, PrecisionType
from aligntune.config.enums import AlgorithmType as A
from aligntune.config.launch import launch_contradictions
from aligntune.config.problems import suggest
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.config.synonyms import Path

MODEL_METRICS = ("bertscore", "semantic_similarity")
"""Metrics that a model of their own computes."""
CHECKPOINT_ARGUMENTS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
"""What `torch.utils.checkpoint.checkpoint` takes; whatever else it is given goes to the layer, which drops it."""
LORA = "lora_rank lora_r lora_alpha lora_dropout target_modules lora_target_modules bias"


def contradictions(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    """(path, message) of settings that exclude each other."""
    if config.dataset is not None and config.datasets:
        yield ("datasets",), "give dataset or datasets, not both"
    for name in ("pad_token", "precompute_ref_log_probs", "precompute_ref_batch_size"):
        if len({getattr(source, name, None) for source in config.sources}) > 1:
            yield ("datasets",), f"differ in {name}, which is of the whole run: give it once, as dataset.{name}"
    if config.eval_dataset is not None and config.eval_dataset.is_set("weight"):
        yield ("eval_dataset", "weight"), "has no effect: evaluation rows are not mixed"
    for name, message in launch_contradictions(config.launch):
        yield ("launch", name), message
    schedule = config.schedule
    if schedule.keep_best and schedule.eval_strategy != schedule.save_strategy:
        yield (
            ("train", "load_best_model_at_end"),
            f"needs checkpoints at evaluations: eval_strategy is {schedule.eval_strategy}, save_strategy {schedule.save_strategy}",
        )
    elif schedule.keep_best and schedule.eval_strategy == "steps" and schedule.save_every % schedule.eval_every:
        yield (
            ("train", "save_interval"),
            f"is {schedule.save_every}, not a multiple of eval_interval {schedule.eval_every}, which load_best_model_at_end needs",
        )
    yield from _never_evaluated(config)
    if config.model.quantization and not (
        config.model.peft_enabled if isinstance(config, SFTRunConfig) else config.model.use_peft
    ):
        yield ("model", "quantization"), "quantised weights cannot be trained: turn LoRA on"
    yield from _settings_of_what_is_off(config)
    loggers = config.logging.loggers
    for name in [loggers] if isinstance(loggers, str) else loggers:
        if name.lower() not in (*LOGGERS, "all", "none"):
            hint = suggest(name, LOGGERS) or f": choose from {', '.join(LOGGERS)}, all, none"
            yield ("logging", "loggers"), f"unknown logger {name!r}{hint}"
    yield from _checkpoint_arguments(config.train.gradient_checkpointing_kwargs)
    yield from _speed_contradictions(config)
    if isinstance(config, SFTRunConfig):
        yield from _sft_contradictions(config)
    else:
        yield from _rl_contradictions(config)


def _never_evaluated(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    """Settings that choose among evaluations, in a run that has none, or that keeps none of their weights."""
    schedule, train = config.schedule, config.train
    if schedule.eval_strategy != "no":
        lacking = None
    elif config.has_eval:
        lacking = "needs evaluations: set eval_strategy to steps or epoch"
    else:
        lacking = "needs evaluation data: give eval_dataset or eval_split"
    if lacking is not None and getattr(train, "early_stopping_patience", None) is not None:
        yield ("train", "early_stopping_patience"), lacking
    if train.is_set("load_best_model_at_end") and train.load_best_model_at_end and not schedule.keep_best:
        yield (
            ("train", "load_best_model_at_end"),
            lacking or "needs checkpoints: set save_strategy to that of eval_strategy",
        )
    for name in ("metric_for_best_model", "greater_is_better"):
        unused = not schedule.keep_best and getattr(train, "early_stopping_patience", None) is None
        if unused and train.is_set(name) and getattr(train, name) != type(train).model_fields[name].default:
            yield (
                ("train", name),
                "has no effect: no best evaluation is kept (load_best_model_at_end) or waited for in this run",
            )


def _settings_of_what_is_off(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    """Settings that were changed and belong to something that is off."""
    model, train = config.model, config.train
    switch = "peft_enabled" if isinstance(config, SFTRunConfig) else "use_peft"
    off: list[tuple[bool, Path, Any, str, str]] = [
        (model.lora is None, ("model",), model, LORA, f"has no effect without LoRA: set {switch}: true, or leave it out"),
        (not model.gradient_checkpointing, ("train",), train, "gradient_checkpointing_kwargs", "needs model.gradient_checkpointing: true"),
    ]  # fmt: skip
    if isinstance(config, SFTRunConfig):
        sft = config.train
        off += [
            (sft.early_stopping_patience is None, ("train",), sft, "early_stopping_threshold", "needs early_stopping_patience"),
            (not (sft.packing or sft.eval_packing), ("train",), sft, "packing_strategy", "needs packing: true"),
            *((not getattr(config.evaluation, f"compute_{metric}"), ("evaluation",), config.evaluation, f"{metric}_model", f"needs compute_{metric}: true")
              for metric in MODEL_METRICS),
        ]  # fmt: skip
    else:
        off += [(is_off, ("train",), config.train, names, message) for is_off, names, message in _off_in_rl(config)]
    sources: list[tuple[Path, Any]] = [(("dataset",), config.dataset)] if config.dataset is not None else []
    sources += [(("datasets", place), item) for place, item in enumerate(config.datasets)]
    for at, source in sources:
        off.append(
            (source.processing_fn is None, at, source, "processing_batched processing_fn_kwargs", "needs processing_fn")
        )
    for is_off, at, section, names, message in off:
        for name in names.split() if is_off else ():
            field = type(section).model_fields.get(name)
            default = None if field is None else field.get_default(call_default_factory=True)
            if field is not None and section.is_set(name) and getattr(section, name) != default:
                yield (*at, name), message


def _checkpoint_arguments(given: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    for name in given:
        if name not in CHECKPOINT_ARGUMENTS:
            close = suggest(name, CHECKPOINT_ARGUMENTS) or f" (there are {', '.join(CHECKPOINT_ARGUMENTS)})"
            yield ("train", "gradient_checkpointing_kwargs"), f"{name} is not an argument of torch's checkpoint{close}"


def _off_in_rl(config: RLRunConfig) -> list[tuple[bool, str, str]]:
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


def _speed_contradictions(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    model, optimizer = config.model, config.train.optimizer
    if config.train.micro_batch_tokens is not None and config.launch.strategy in ("zero2", "zero3"):
        yield (
            ("train", "micro_batch_tokens"),
            "DeepSpeed steps by its own count of backward passes: use launch.strategy ddp or fsdp2, or more gradient_accumulation_steps",
        )
    if model.selective_checkpointing != "off":
        if model.compile is False:
            yield ("model", "selective_checkpointing"), "needs compiled layers: leave compile: false out"
        if model.gradient_checkpointing and model.is_set("gradient_checkpointing"):
            yield ("model", "selective_checkpointing"), "and gradient_checkpointing: true exclude each other; keep one"
    if optimizer in SPLIT_OPTIMIZERS:
        if any(getattr(source.task_type, "is_classification", False) for source in config.sources):
            yield ("train", "optimizer"), f"{optimizer} is for language modelling: use adamw_torch"
        if model.lora is not None:
            yield ("train", "optimizer"), f"{optimizer} is for full fine-tuning: LoRA's few weights are float32 anyway"
        if model.precision in (PrecisionType.FP16, PrecisionType.FP32):
            yield (
                ("train", "optimizer"),
                f"{optimizer} splits bfloat16 weights: use precision bf16, not {model.precision.value}",
            )
        if config.launch.strategy in ("fsdp2", "zero2", "zero3"):
            yield ("train", "optimizer"), f"{optimizer} needs whole weights: use launch.strategy ddp, or adamw_torch"


def _sft_contradictions(config: SFTRunConfig) -> Iterator[tuple[Path, str]]:
    model = config.model
    if config.train.activation_offloading and (model.compile or model.selective_checkpointing != "off"):
        name = "compile: true" if model.compile else f"selective_checkpointing: {model.selective_checkpointing}"
        yield (
            ("train", "activation_offloading"),
            f"and model.{name} exclude each other: the compiler traces what moves the activations; keep one",
        )
    train = config.train
    if train.label_smoothing_factor and train.loss_type == "dft":
        yield ("train", "label_smoothing_factor"), "is defined for loss_type nll, not dft"
    if train.loss_function is not None:
        if train.is_set("loss_type"):
            yield ("train", "loss_type"), "has no effect beside loss_function: keep one"
        if train.label_smoothing_factor:
            yield ("train", "label_smoothing_factor"), "has no effect beside loss_function: leave it out"
    if train.completion_only_loss is False and train.assistant_only_loss:
        yield ("train", "assistant_only_loss"), "and completion_only_loss: false contradict each other"
    if config.model.num_labels is not None and not all(source.task_type.is_classification for source in config.sources):
        yield ("model", "num_labels"), "is for the classification tasks"
    if any(source.streaming for source in config.sources):
        if train.max_steps is None:
            yield (
                ("train", "max_steps"),
                "is required with dataset.streaming: a stream does not tell how many rows it has",
            )
        if train.group_by_length:
            yield ("train", "group_by_length"), "needs the length of every row, which a stream does not tell"
    yield from classification_contradictions(config)


def _rl_contradictions(config: RLRunConfig) -> Iterator[tuple[Path, str]]:
    train, model = config.train, config.model
    if train.is_set("ds3_gather_for_generation") and config.launch.strategy != "zero3":
        yield ("train", "ds3_gather_for_generation"), "acts with DeepSpeed ZeRO-3 only (launch.strategy: zero3)"
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
    if train.ref_model_sync_steps and train.is_set("ref_model_sync_steps") and not train.sync_ref_model:
        yield ("train", "ref_model_sync_steps"), "needs sync_ref_model: true"
    if train.is_set("ref_model_mixup_alpha") and not train.sync_ref_model:
        yield ("train", "ref_model_mixup_alpha"), "needs sync_ref_model: true"
    if config.algorithm is not A.DPO and train.sync_ref_model and not config.has_reference:
        yield ("train", "sync_ref_model"), "needs a reference: kl_coef is 0"
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
    if isinstance(train, DAPOConfig) and train.overlong_buffer > train.max_completion_length:
        yield (
            ("train", "overlong_buffer"),
            f"is {train.overlong_buffer}, more than max_completion_length {train.max_completion_length}: every completion "
            "would be punished; it is the last part of that limit",
        )
    if isinstance(train, MetaESConfig):
        yield from _meta_es(config, train)


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
        yield ("train", "evolved_params"), "evolve with target rewards or both"
    if train.is_set("eval_temperature") and train.eval_k == 1:
        yield ("train", "eval_temperature"), "acts with eval_k above 1 (1 is greedy)"
    if config.launch.is_active:
        yield ("launch",), "Meta-ES starts its processes itself: leave launch out, and set train.num_workers"
