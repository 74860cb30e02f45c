"""Which settings would make a run fit? Tried one after another, the cheapest first, each by planning the changed config.

A change is an override (`train.gradient_checkpointing=true`), so that what is proposed is what can be typed, and is resolved
and checked as the run itself will be. One that the config refuses, or that saves nothing, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aligntune.config import applies
from aligntune.config.enums import AlgorithmType, PrecisionType
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import AlignTuneError
from aligntune.planning.situation import Situation, copies_reference

LEAST = 0.01
"""A change that saves less than this share of the peak is not worth a setting."""
Planner = Callable[[list[str]], Situation]
"""The situation of the run with these overrides more."""


@dataclass(frozen=True)
class Change:
    """`overrides` to add to the command, `cost` in a few words, and the bytes that it saves after those before it."""

    overrides: tuple[str, ...]
    cost: str
    saves: float


@dataclass(frozen=True)
class Advice:
    """`changes` in order; `peak` with all of them; whether that fits."""

    changes: list[Change]
    peak: float
    fits: bool


def advise(plan: Planner, need: Callable[[Situation], float], room: float) -> Advice:
    """The changes that bring `need` to at most `room` bytes, without those that turn out not to be needed."""
    chosen: list[tuple[tuple[str, ...], str]] = []
    now = plan([])
    for kind in KINDS:
        if need(now) <= room:
            break
        before = now
        for overrides, cost in kind(before.run):
            found = _try(plan, [*_flat(chosen), *overrides])
            if found is None or need(found) > need(before) * (1 - LEAST):
                continue
            now, best = found, (overrides, cost)
            if need(found) <= room:
                break
        if now is not before:
            chosen.append(best)
    for change in chosen[-2::-1]:  # the dearest first
        others = [entry for entry in chosen if entry is not change]
        found = _try(plan, _flat(others))
        if found is not None and need(found) <= room:
            chosen = others
    return _measured(plan, need, room, chosen)


def _measured(
    plan: Planner, need: Callable[[Situation], float], room: float, chosen: list[tuple[tuple[str, ...], str]]
) -> Advice:
    changes, taken, last = [], [], need(plan([]))
    for overrides, cost in chosen:
        taken += overrides
        size = need(plan(taken))
        changes.append(Change(overrides, cost, last - size))
        last = size
    return Advice(changes, last, last <= room)


def _try(plan: Planner, overrides: list[str]) -> Situation | None:
    try:
        return plan(overrides)
    except AlignTuneError:
        return None


def _flat(chosen: list[tuple[tuple[str, ...], str]]) -> list[str]:
    return [override for overrides, _ in chosen for override in overrides]


# What may be changed, cheapest first --------------------------------------------------------------------------------

Run = SFTRunConfig | RLRunConfig
Kind = Callable[[Run], Iterator[tuple[tuple[str, ...], str]]]


def _fused(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    if run.train.optimizer == "adamw_torch":
        yield ("train.optimizer=adamw_torch_fused",), "none: the same update in one kernel"


def _half(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    if run.model.precision is PrecisionType.FP32:
        yield ("model.precision=bf16",), "rounding of activations; weights stay float32"


def _checkpointing(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    if not run.model.gradient_checkpointing:
        yield ("model.gradient_checkpointing=true",), "about a third more time"


def _precomputed(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    if run.algorithm is AlgorithmType.DPO and copies_reference(run):
        yield ("dataset.precompute_ref_log_probs=true",), "a pass over the pairs before training"


def _micro(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    """Divisors of the micro-batch, largest first, at the same global batch and, where groups were as large as it, group size."""
    train = run.train
    rows, steps = train.per_device_batch_size, train.gradient_accumulation_steps
    group = ()
    if isinstance(run, RLRunConfig) and run.algorithm in applies.GROUP_RELATIVE:
        group = (f"train.num_generations={run.train.num_generations}",)
    for smaller in (size for size in range(rows // 2, 0, -1) if rows % size == 0):
        overrides = (f"train.per_device_batch_size={smaller}", f"train.gradient_accumulation_steps={steps * rows // smaller}")
        yield (*overrides, *group), "shorter matrix products; the same optimiser step"


def _eight_bit(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    if run.train.optimizer.startswith("adamw_torch"):
        yield ("train.optimizer=adamw_8bit",), "states rounded to 8 bits; needs the extra quant"


def _lora(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    if run.model.lora is None:
        yield (f"model.{'peft_enabled' if isinstance(run, SFTRunConfig) else 'use_peft'}=true",), "an adapter is trained, not all weights"


def _four_bit(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    if run.model.lora is not None and not run.model.quantization:
        yield ("model.quantization={load_in_4bit: true}",), "a base rounded to 4 bits; needs the extra quant"


def _shorter(run: Run) -> Iterator[tuple[tuple[str, ...], str]]:
    length = run.model.max_seq_length
    while length >= 512:
        length //= 2
        yield (f"model.max_seq_length={length}",), "longer rows are cut"


KINDS: tuple[Kind, ...] = (_fused, _half, _checkpointing, _precomputed, _micro, _eight_bit, _lora, _four_bit, _shorter)
