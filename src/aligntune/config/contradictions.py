"""Which settings exclude each other, or have no effect beside others? Such a config is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aligntune.config.best_metric import goes_by_metric, metrics_of, unknown_metric
from aligntune.config.classification import classification_contradictions
from aligntune.config.enums import LOGGERS, PrecisionType
from aligntune.config.launch import launch_contradictions
from aligntune.config.optimizers import MEASURED_SCHEDULES, SPLIT_OPTIMIZERS
from aligntune.config.rl_contradictions import off_in_rl, rl_contradictions
from aligntune.config.row_formats import unknown_formats
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.config.synonyms import Path
from aligntune.config.words import suggest

MODEL_METRICS = ("bertscore", "semantic_similarity")
"""Metrics that a model of their own computes."""
CHECKPOINT_ARGUMENTS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
"""What `torch.utils.checkpoint.checkpoint` takes; whatever else it is given goes to the layer, which drops it."""
QUANTIZATION_FIELDS = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
)  # fmt: skip
"""What transformers' `BitsAndBytesConfig` takes; it drops whatever else it is given."""
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
    yield from unknown_metric(config)
    yield from _learning_rate(config)
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
    checkpointing = config.train.gradient_checkpointing_kwargs
    yield from _arguments(
        ("train", "gradient_checkpointing_kwargs"),
        checkpointing,
        CHECKPOINT_ARGUMENTS,
        "an argument of torch's checkpoint",
    )
    for name in ("quantization", "reward_model_quantization", "value_model_quantization"):
        given = getattr(config.model, name, {})
        yield from _arguments(("model", name), given, QUANTIZATION_FIELDS, "a field of BitsAndBytesConfig")
    yield from unknown_formats(config)
    yield from _speed_contradictions(config)
    if isinstance(config, SFTRunConfig):
        yield from _sft_contradictions(config)
    else:
        yield from rl_contradictions(config)


def _never_evaluated(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    """Settings that choose among evaluations, in a run that has none, or that keeps none of their weights."""
    schedule, train = config.schedule, config.train
    if schedule.eval_strategy != "no":
        lacking = None
    elif config.has_eval:
        lacking = "needs evaluations: set eval_strategy to steps or epoch"
    else:
        lacking = "needs evaluation data: give eval_dataset or eval_split"
    if lacking is not None and train.lr_scheduler in MEASURED_SCHEDULES:
        yield ("train", "lr_scheduler"), f"{train.lr_scheduler} {lacking}"
    if lacking is not None and getattr(train, "early_stopping_patience", None) is not None:
        yield ("train", "early_stopping_patience"), lacking
    if train.is_set("load_best_model_at_end") and train.load_best_model_at_end and not schedule.keep_best:
        yield (
            ("train", "load_best_model_at_end"),
            lacking or "needs checkpoints: set save_strategy to that of eval_strategy",
        )
    for name in ("metric_for_best_model", "greater_is_better"):
        if (
            not goes_by_metric(config)
            and train.is_set(name)
            and getattr(train, name) != type(train).model_fields[name].default
        ):
            yield (
                ("train", name),
                "has no effect: no best evaluation is kept (load_best_model_at_end) or waited for in this run",
            )


def _learning_rate(config: SFTRunConfig | RLRunConfig) -> Iterator[tuple[Path, str]]:
    """What a schedule does not do."""
    train, schedule = config.train, config.schedule
    if train.lr_scheduler in ("constant", *MEASURED_SCHEDULES):
        for name in ("warmup_steps", "warmup_ratio"):
            if train.is_set(name) and getattr(train, name):
                yield (
                    ("train", name),
                    f"has no effect with lr_scheduler {train.lr_scheduler}: constant_with_warmup has one",
                )
    if train.lr_scheduler in MEASURED_SCHEDULES and schedule.greater_is_better:
        instead = "metric_for_best_model eval_loss, or " if "loss" in metrics_of(config) else ""
        yield (
            ("train", "lr_scheduler"),
            f"{train.lr_scheduler} takes a lower metric for better, and more is better for {schedule.best_metric}: use {instead}another schedule",
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
        off += [(is_off, ("train",), config.train, names, message) for is_off, names, message in off_in_rl(config)]
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


def _arguments(at: Path, given: Mapping[str, Any], known: Sequence[str], what: str) -> Iterator[tuple[Path, str]]:
    """Names among `given` that another library would drop."""
    for name in given:
        if name not in known:
            close = suggest(name, known) or f" (there are {', '.join(known)})"
            yield at, f"{name} is not {what}{close}"


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
