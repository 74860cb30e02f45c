"""What are our settings called in transformers' `TrainingArguments`? The one place where the names change."""

from __future__ import annotations

import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from aligntune.config.optimizers import SPLIT_OPTIMIZERS
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import ConfigError, require
from aligntune.models.precision import Precision, device
from aligntune.optim.split_adamw import SplitAdamW

PACKAGES = {
    "torch_4bit": ("torchao", "torchao"), "torch_8bit": ("torchao", "torchao"), "schedule_free": ("schedulefree", "schedulefree"),
    "lomo": ("lomo_optim", "lomo-optim"), "stable_adamw": ("optimi", "torch-optimi"), "grokadamw": ("grokadamw", "grokadamw"),
    "anyprecision": ("torchdistx", "torchdistx"), "xla": ("torch_xla", "torch_xla"), "npu": ("torch_npu", "torch_npu"),
}  # fmt: skip
"""Part of an optimiser's name -> the module that it needs, and what `pip` calls it."""
LARGE_EPOCHS = 1_000_000
"""Passes when only `max_steps` counts."""


def training_arguments(
    run: SFTRunConfig | RLRunConfig, checkpoints: Path, precision: Precision, *, cls: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> Any:  # fmt: skip
    """`cls` filled from the run: optimiser, schedule, batches, precision, evaluation and checkpoints.

    `more` are fields of `cls` of the caller's own. Logging goes through our callback, so `report_to` is none. Every field
    that has a setting is passed, so that no default of another library shows through.
    """
    train, schedule = run.train, run.schedule
    _check_hardware(run)
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": train.per_device_batch_size,
        "per_device_eval_batch_size": getattr(train, "per_device_eval_batch_size", train.per_device_batch_size),
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "max_steps": train.max_steps if train.max_steps is not None else -1,
        "num_train_epochs": train.epochs if train.epochs is not None else LARGE_EPOCHS,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "warmup_steps": train.warmup_steps if train.warmup_steps else min(train.warmup_ratio, 1 - 1e-9),
        "max_grad_norm": train.max_grad_norm,
        "optim": _transformers_name(train),
        "lr_scheduler_type": train.lr_scheduler,
        "bf16": precision.compute is torch.bfloat16 and precision.autocasts,
        "fp16": precision.compute is torch.float16,
        "use_cpu": device().type == "cpu",
        "gradient_checkpointing": run.model.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} | train.gradient_checkpointing_kwargs,
        "logging_strategy": schedule.log_strategy,
        "logging_steps": schedule.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": schedule.eval_strategy,
        "eval_steps": schedule.eval_every,
        "eval_on_start": schedule.eval_strategy != "no",
        "save_strategy": schedule.save_strategy,
        "save_steps": schedule.save_every,
        "save_total_limit": schedule.save_total_limit,
        "load_best_model_at_end": schedule.keep_best,
        "metric_for_best_model": schedule.best_metric,
        "greater_is_better": schedule.greater_is_better,
        "restore_callback_states_from_checkpoint": True,
        "seed": train.seed,
        "data_seed": train.data_seed if train.data_seed is not None else train.seed,
        "report_to": "none",
        "run_name": run.logging.run_name,
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": device().type == "cuda",
        "use_liger_kernel": train.use_liger_kernel,
        "save_only_model": False,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # language models' are constants
        # A stream's batches cannot be sent: each process reads it. A copy that blocks would wait for all that the GPU has still to do.
        "accelerator_config": {"dispatch_batches": False, "non_blocking": device().type == "cuda"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the names that all supported versions know are the older ones
        try:
            made = cls(**(values | more))
        except ValueError as error:
            raise _unknown_word(train, error) from error
    made.asked = values | more  # for a backend that must show that it kept them
    return made


def splits(run: SFTRunConfig | RLRunConfig) -> bool:
    """Whether the run's optimiser splits bfloat16 weights."""
    return run.train.optimizer in SPLIT_OPTIMIZERS


def own_optimizer(run: SFTRunConfig | RLRunConfig, arguments: TrainingArguments) -> dict[str, Any]:
    """The argument by which a native trainer gets an optimiser of our own; empty for transformers' optimisers."""
    if not splits(run):
        return {}
    settings = {
        "lr": arguments.learning_rate, "betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon,
        "moments": torch.bfloat16 if run.train.optimizer == "adamw_split_bf16" else torch.float32,
    }  # fmt: skip
    return {"optimizer_cls_and_kwargs": (SplitAdamW, settings)}


def _transformers_name(train: Any) -> str:
    """The optimiser in transformers' words. The default becomes its fused kernel on a GPU: the same update, without the
    temporaries; one of our own is handed over separately."""
    if train.optimizer in SPLIT_OPTIMIZERS:
        return "adamw_torch"
    fused = not train.is_set("optimizer") and device().type == "cuda"
    return "adamw_torch_fused" if fused else str(train.optimizer)


def _unknown_word(train: Any, error: ValueError) -> ValueError:
    """The error about an optimiser or schedule that transformers does not know, in the words of the setting."""
    for name in ("optimizer", "lr_scheduler"):
        if str(error).startswith(f"{getattr(train, name)} is not a valid"):
            return ConfigError(f"train.{name}: {error}")
    return error


def _check_hardware(run: SFTRunConfig | RLRunConfig) -> None:
    """Refuse what this machine cannot do, rather than leave it out."""
    train, on_cpu = run.train, device().type == "cpu"
    if re.search("bnb|paged|^lion|^ademamix|(?<!torch)_8bit", train.optimizer):
        require("bitsandbytes", extra="quant", why=f"train.optimizer: {train.optimizer}")
    module, package = next((needed for word, needed in PACKAGES.items() if word in train.optimizer), (None, ""))
    if module is not None and find_spec(module) is None:
        raise ConfigError(
            f"train.optimizer: {train.optimizer} needs the package {module}, which is not installed: pip install {package}"
        )
    if train.use_liger_kernel:
        require("liger_kernel", extra="liger", why="train.use_liger_kernel")
    for name in ("activation_offloading", "use_liger_kernel"):
        if getattr(train, name, False) and on_cpu:
            raise ConfigError(f"train.{name}: needs a GPU; leave it out on the CPU")
