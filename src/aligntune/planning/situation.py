"""What does the memory model see of a resolved run? What is loaded, how long rows may be, which backend's kernels run.

Rows are taken at their cap (`max_seq_length`, `max_length`, prompt and completion budgets), which is what a run must survive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

from aligntune.backends.select import choose
from aligntune.config import applies
from aligntune.config.enums import AlgorithmType, PrecisionType
from aligntune.config.launch import SHARDED
from aligntune.config.optimizers import SPLIT_OPTIMIZERS
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import ModelError
from aligntune.models.files import model_folder
from aligntune.planning.compiled import what_compiled_layers_keep
from aligntune.planning.memory import (
    CONTEXT,
    OPTIMIZERS,
    Batch,
    Head,
    Quantised,
    Rollout,
    Training,
    rounded_bytes,
    weight_bytes,
)
from aligntune.planning.shapes import Shape, read_shape, saved_bytes_per_parameter
from aligntune.planning.steps import optimizer_steps, phases_of
from aligntune.trainers.online_plan import prompt_budget

Run = SFTRunConfig | RLRunConfig
MOST_ROWS = 512
"""Completions that the rollout engine decodes at a time (`rollouts.graph.MOST_ROWS`)."""


@dataclass
class Situation:
    """A run as the memory model sees it."""

    run: Run
    backend: str
    attention: str
    training: Training
    processes: int
    notes: list[str] = field(default_factory=list)
    """What was assumed, for the reader."""


def situation(run: Run, card: float | None = None) -> Situation:
    """The memory model's view of `run` on a card with `card` bytes (None: unknown).

    Raises `BackendError` when no backend runs the config, `ModelError` for a model that cannot be planned.
    """
    backend = choose(run)[0].name
    model, notes = run.model, [f"backend {backend}", "a GPU with bf16 (Ampere or newer)"]
    shape = read_shape(str(run.model.name_or_path))  # `sft_path` has the same architecture
    if _classifies(run):
        shape = replace(shape, tied=True)  # a few rows of a classifier take the place of a language-model head
    if backend == "unsloth":
        notes.append("Unsloth brings kernels of its own: expect less than these numbers, which are those of TRL")
    if getattr(run.train, "activation_offloading", False):
        notes.append(
            "activations are counted as if they stayed on the GPU: with activation_offloading expect less there"
        )
    attention = _attention(model.attn_implementation, shape)
    compute = 4 if model.precision is PrecisionType.FP32 else 2
    processes = _processes(run, notes)
    strategy = run.launch.strategy if processes > 1 else "ddp"
    replicated = processes > 1 and strategy == "ddp"
    accumulation = run.train.gradient_accumulation_steps
    optimizer = run.train.optimizer if run.train.is_set("optimizer") else "adamw_torch_fused"  # the default on a GPU
    if optimizer not in OPTIMIZERS:
        notes.append(f"optimiser {optimizer} is not known here: counted as adamw_torch")
        optimizer = "adamw_torch"
    packed = backend == "native" and not _classifies(run)
    batch, head = _batch(run, shape, packed, attention), _head(run, packed)
    if batch.cut_from is not None:
        notes.append(f"batches of {batch.cut_from:,} tokens in passes of at most {batch.tokens:,} (micro_batch_tokens)")
    compiled = what_compiled_layers_keep(run, shape, lambda: optimizer_steps(run, processes)) if packed else None
    if compiled is not None:
        notes.append("compiled layers (a C compiler is there)")
    training = Training(
        shape, batch, head, model.lora, compute, trained=2 if optimizer in SPLIT_OPTIMIZERS else 4, compiled=compiled,
        quantised=_quantised(model.quantization), optimizer=optimizer, checkpointing=model.gradient_checkpointing,
        accumulates=accumulation > 1 or batch.cut_from is not None, bucketed=replicated and backend == "native",
        eager=attention == "eager",
        repeats_keys=attention == "varlen" and not batch.masked and not _varlen_groups(), value=_value_model(run),
        weight_shards=processes if strategy in SHARDED else 1,
        state_shards=processes if strategy in ("fsdp2", "zero2", "zero3") else 1,
    )  # fmt: skip
    frozen = _other_models(run, training, notes)
    if replicated and backend != "native":  # beside the gradients, which native trainers keep there
        frozen["gradient buckets of DDP"] = float(training.trained * training.trained_parameters)
    if isinstance(run, RLRunConfig) and run.algorithm in applies.ONLINE and not run.train.fast_inference:
        rollout = _rollout(run, training, card, sum(frozen.values()))
        training = replace(training, rollout=rollout)
        if strategy == "fsdp2":
            frozen["rollout copy of the policy"] = weight_bytes(training)
    if isinstance(run, RLRunConfig) and run.train.fast_inference:
        share = run.train.vllm_gpu_memory_utilization
        if card is None:
            notes.append(f"vLLM takes {share:.0%} of the card besides")
        else:
            frozen["vLLM"] = share * card
    return Situation(run, backend, attention, replace(training, frozen=frozen), processes, notes)


# Parts --------------------------------------------------------------------------------------------------------------


def _attention(wanted: str, shape: Shape) -> str:
    """`flash`, `varlen`, `sdpa` or `eager`; `auto` as on a GPU (`models.kernels.attention.resolve_attention`)."""
    if wanted == "auto":
        if find_spec("flash_attn") is not None:
            return "flash"
        return "eager" if shape.softcap else "varlen"
    return "flash" if wanted.startswith("flash") else "sdpa" if wanted == "flex_attention" else wanted


def _varlen_groups() -> bool:
    """Whether torch's varlen kernel reads grouped keys as they are."""
    try:
        return Version(version("torch")) >= Version("2.12")
    except PackageNotFoundError:
        return True


def _processes(run: Run, notes: list[str]) -> int:
    launch = run.launch
    if not launch.is_active:
        return 1
    if launch.num_processes is None:
        notes.append("launch.num_processes is unset: counted as one process; set it to plan for several")
        return 1
    return int(launch.num_processes) * max(1, len(launch.hosts) or launch.nodes)


def _quantised(settings: dict[str, Any]) -> Quantised | None:
    if settings.get("load_in_4bit"):
        return "4bit double" if settings.get("bnb_4bit_use_double_quant") else "4bit"
    return "8bit" if settings.get("load_in_8bit") else None


def _classifies(run: Run) -> bool:
    return isinstance(run, SFTRunConfig) and any(source.task_type.is_classification for source in run.sources)


def _batch(run: Run, shape: Shape, packed: bool, attention: str) -> Batch:
    """The longest pass: every row at its cap, as many as `micro_batch_tokens` allows."""
    train, bound = run.train, run.model.max_seq_length
    rows, longest, predicted = train.per_device_batch_size, bound, bound
    joined = packed
    if isinstance(run, SFTRunConfig):
        together = run.train.padding_free or (run.train.packing and run.train.packing_strategy == "bfd")
        joined = not _classifies(run) and (packed or together)
    elif run.algorithm is AlgorithmType.DPO:
        rows, longest = 2 * rows, min(run.train.max_length, bound)
        predicted = min(longest, run.train.max_target_length or longest)
    else:
        predicted = run.train.max_completion_length
        longest = prompt_budget(run) + predicted
    tokens, whole = rows * longest, rows * longest
    if train.micro_batch_tokens is not None:
        least = 2 * longest if run.algorithm is AlgorithmType.DPO else longest  # a pair stays whole
        room = max(train.micro_batch_tokens, least)
        tokens = min(whole, room if joined else room // least * least)
    several, cut_from = tokens > longest, whole if tokens < whole else None
    predicted = min(rows * predicted, tokens)
    masked = not joined and attention in ("varlen", "sdpa") and several
    if joined and attention in ("sdpa", "eager") and several:
        # transformers' own kernels see one row with a mask of blocks
        return Batch(tokens, predicted, tokens, attention == "sdpa", cut_from)
    return Batch(tokens, predicted, longest, masked, cut_from)


def _head(run: Run, packed: bool) -> Head:
    if _classifies(run):
        return "none"
    if not packed:
        smoothed = isinstance(run, SFTRunConfig) and run.train.label_smoothing_factor
        return "full" if smoothed else "tiles"
    plain = isinstance(run, SFTRunConfig) and run.train.loss_type == "nll" and run.train.loss_function is None
    return "loss" if plain else "log_probs"


def copies_reference(run: Run) -> bool:
    """Whether the reference is a model of its own in memory while training (`trainers.reference`)."""
    if not isinstance(run, RLRunConfig) or not run.has_reference or run.model.ref_adapter_name is not None:
        return False
    if run.algorithm is AlgorithmType.DPO and any(source.precompute_ref_log_probs for source in run.sources):
        return False
    own = run.model.force_use_ref_model or run.model.ref_model_init_kwargs or run.train.sync_ref_model
    return run.model.lora is None or bool(own)


def _other_models(run: Run, training: Training, notes: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    if not isinstance(run, RLRunConfig):
        return found
    if copies_reference(run):
        # Full fine-tuning copies the policy as it is; beside an adapter the base is loaded in the compute format.
        size = training.trained if training.full else training.compute
        found["reference model"] = size * training.shape.parameters / training.weight_shards
    if (
        run.algorithm in applies.ONLINE
        and (name := _reward_model(run)) is not None
        and run.model.reward_device != "cpu"
    ):
        try:
            folder = model_folder(name)
            found["reward model"] = saved_bytes_per_parameter(folder) * read_shape(folder).parameters
        except ModelError as error:
            notes.append(f"the reward model is not counted: {error}")
    if (run.reward_training or getattr(run.model.reward_model_source, "training_config", None)) is not None:
        notes.append("the training of the reward model, which comes first, is not counted")
    if run.model.is_set("reward_value_model") and run.model.value_model_quantization:
        notes.append("the quantised value model is counted as a trained one")
    return found


def _reward_model(run: RLRunConfig) -> str | None:
    source = run.model.reward_model_source
    if source is not None:
        training = source.training_config
        return source.model_path or source.model_name or (training.base_model_name if training else None)
    if run.reward_training is not None:
        return run.reward_training.base_model_name
    return run.model.reward_path or run.model.reward_model_name


def _value_model(run: Run) -> Shape | None:
    if run.algorithm is AlgorithmType.PPO and run.model.is_set("reward_value_model"):
        return read_shape(run.model.reward_value_model)  # type: ignore[union-attr]
    return None


def _rollout(run: RLRunConfig, training: Training, card: float | None, others: float) -> Rollout:
    """Rows decoded at a time: all completions of a phase, at most 512, and no more than half of the free memory holds when the
    first rollout begins."""
    plan, longest = phases_of(run), prompt_budget(run)
    prompts, group = plan.prompts, plan.group
    length = -(-(longest + run.train.max_completion_length) // 64) * 64
    rows = min(MOST_ROWS, prompts * group)
    if card is not None:
        s = training.shape
        each = 2 * s.layers * s.keys * training.compute * length + 12 * s.vocab
        rounded = rounded_bytes(replace(training, rollout=Rollout(1, length, 1)))
        free = card - CONTEXT - weight_bytes(training) / training.weight_shards - rounded - others
        rows = max(1, min(rows, int(free / 2 / each)))
    rows = max(group, rows // group * group)
    return Rollout(math.ceil(rows / 8) * 8, length, min(prompts, rows // group) * longest)
