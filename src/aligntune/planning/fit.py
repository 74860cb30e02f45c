"""Which settings would make a run fit? Tried one after another, the cheapest first, each by planning the changed config.

A change is an override (`train.gradient_checkpointing=true`), so that what is proposed is what can be typed, and is resolved
and checked as the run itself will be. One that the config refuses, or that saves nothing, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aligntune.config import applies
from aligntune.config.enums import AlgorithmType, PrecisionType
from aligntune.config.optimizers import SPLIT_OPTIMIZERS
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.errors import AlignTuneError
from aligntune.planning.situation import Situation, copies_reference

ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_split")
"""The same update: `adamw_split_bf16` may take their place."""
LEAST = 0.01
"""A change that saves less than this share of the peak is not worth a setting."""
LONG = 16_384
"""Tokens of a pass with which the speeds in `docs/performance.md` were measured: longer ones are not needed for speed."""
Planner = Callable[[list[str]], Situation]
"""The situation of the run with these overrides more."""
Need = Callable[[Situation], float]
"""The bytes that it takes."""
Proposal = tuple[tuple[str, ...], str]
"""Overrides, and what they cost in a few words."""
Run = SFTRunConfig | RLRunConfig
Kind = Callable[[Situation], Iterator[Proposal]]
"""The proposals of one kind for a run as it is, in the order in which they are tried."""


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


def advise(plan: Planner, need: Need, room: float) -> Advice:
    """The changes that bring `need` to at most `room` bytes, without those that turn out not to be needed.

    After each change the cheapest are tried again: what saved nothing may do so now that the peak is elsewhere. A change that
    sets all that an earlier one set takes its place.
    """
    chosen: list[Proposal] = []
    left, now = list(KINDS), plan([])
    while need(now) > room:
        found = next(
            (entry for kind in left if (entry := _best(kind, plan, need, room, now, chosen)) is not None), None
        )
        if found is None:
            break
        kind, proposal, now = found
        left.remove(kind)
        kept = _with(chosen, proposal)[:-1]
        undone = {name for entry in chosen if entry not in kept for name in _names(entry)}
        chosen = [*kept, _without(undone, proposal, kept, plan, need, now)]
    for change in chosen[-2::-1]:  # the dearest first
        others = [entry for entry in chosen if entry is not change]
        without = _try(plan, _flat(others))
        if without is not None and need(without) <= room:
            chosen = others
    return _measured(plan, need, room, chosen)


def _best(
    kind: Kind, plan: Planner, need: Need, room: float, now: Situation, chosen: list[Proposal]
) -> tuple[Kind, Proposal, Situation] | None:
    """The first proposal of `kind` that fits, else the last that saves; None when none does."""
    best = None
    for proposal in kind(now):
        found = _try(plan, _flat(_with(chosen, proposal)))
        if found is None or need(found) > need(now) * (1 - LEAST):
            continue
        best = (kind, proposal, found)
        if need(found) <= room:
            break
    return best


def _measured(plan: Planner, need: Need, room: float, chosen: list[Proposal]) -> Advice:
    """What each saves after those before it; one that does so only after a later one comes after that."""
    changes: list[Change] = []
    taken: list[str] = []
    left, last = list(chosen), need(plan([]))
    while left:
        tried = [_try(plan, [*taken, *overrides]) for overrides, _ in left]
        sizes = [math.inf if found is None else need(found) for found in tried]
        at = next((place for place, size in enumerate(sizes) if size < last * (1 - LEAST)), sizes.index(min(sizes)))
        overrides, cost = left.pop(at)
        taken += overrides
        changes.append(Change(overrides, cost, last - sizes[at]))
        last = sizes[at]
    return Advice(changes, last, last <= room)


def _try(plan: Planner, overrides: list[str]) -> Situation | None:
    try:
        return plan(overrides)
    except AlignTuneError:
        return None


def _flat(chosen: list[Proposal]) -> list[str]:
    return [override for overrides, _ in chosen for override in overrides]


def _with(chosen: list[Proposal], proposal: Proposal) -> list[Proposal]:
    return [entry for entry in chosen if not _names(entry) <= _names(proposal)] + [proposal]


def _without(
    undone: set[str], proposal: Proposal, kept: list[Proposal], plan: Planner, need: Need, now: Situation
) -> Proposal:
    """`proposal`, which beside `kept` led to `now`, without overrides that only take back a change whose place it took."""
    overrides, cost = proposal
    for override in overrides:
        less = (tuple(other for other in overrides if other != override), cost)
        if override.partition("=")[0] in undone:
            found = _try(plan, _flat([*kept, less]))
            if found is not None and need(found) == need(now):
                overrides = less[0]
    return overrides, cost


def _names(proposal: Proposal) -> set[str]:
    return {override.partition("=")[0] for override in proposal[0]}


# What may be changed, cheapest first --------------------------------------------------------------------------------


def _fused(now: Situation) -> Iterator[Proposal]:
    if now.run.train.optimizer == "adamw_torch":
        yield ("train.optimizer=adamw_torch_fused",), "none: the same update in one kernel"


def _half(now: Situation) -> Iterator[Proposal]:
    if now.run.model.precision is PrecisionType.FP32:
        yield ("model.precision=bf16",), "rounding of activations; weights stay float32"


def _selective(now: Situation) -> Iterator[Proposal]:
    """Costs as measured on an H100 at the shape of a 0.5B model. LoRA has less else to compute, so that they weigh more."""
    model = now.run.model
    half, both = ("below 1 %", "about 5 %") if model.lora is None else ("about 7 %", "about 10 %")
    if now.backend == "native" and not model.gradient_checkpointing and model.selective_checkpointing == "off":
        yield ("model.selective_checkpointing=cheap",), "norms and activations are computed twice"
        yield ("model.selective_checkpointing=half",), f"the same and one of two MLP products; {half} of speed"
        yield ("model.selective_checkpointing=mlp",), f"the same and both MLP products; {both} of speed"


def _split(now: Situation) -> Iterator[Proposal]:
    bf16 = now.run.model.precision in (PrecisionType.BF16, PrecisionType.AUTO)
    if now.backend == "native" and bf16 and now.run.model.lora is None and now.run.train.optimizer in ADAMW:
        yield ("train.optimizer=adamw_split_bf16",), "moments rounded to bfloat16; weights stay exact"


def _checkpointing(now: Situation) -> Iterator[Proposal]:
    model = now.run.model
    if not model.gradient_checkpointing:
        yield (*_all_kept(now), "model.gradient_checkpointing=true"), "about a third more time"


def _precomputed(now: Situation) -> Iterator[Proposal]:
    if now.run.algorithm is AlgorithmType.DPO and copies_reference(now.run):
        yield ("dataset.precompute_ref_log_probs=true",), "a pass over the pairs before training"


def _micro(now: Situation) -> Iterator[Proposal]:
    """Divisors of the micro-batch, largest first, at the same global batch and, where groups were as large as it, group size."""
    train = now.run.train
    rows, steps = train.per_device_batch_size, train.gradient_accumulation_steps
    group: tuple[str, ...] = ()
    if isinstance(now.run, RLRunConfig) and now.run.algorithm in applies.GROUP_RELATIVE:
        group = (f"train.num_generations={now.run.train.num_generations}",)
    for smaller in (size for size in range(rows // 2, 0, -1) if rows % size == 0):
        overrides = (
            f"train.per_device_batch_size={smaller}",
            f"train.gradient_accumulation_steps={steps * rows // smaller}",
        )
        yield (*overrides, *group), "shorter matrix products; the same optimiser step"


def _long_passes(now: Situation) -> Iterator[Proposal]:
    for tokens in _halves(now, LONG):
        yield (f"train.micro_batch_tokens={tokens}",), "more passes, long ones still; the same optimiser step"


def _short_passes(now: Situation) -> Iterator[Proposal]:
    for tokens in _halves(now, 1):
        yield (f"train.micro_batch_tokens={tokens}",), "shorter matrix products; the same optimiser step"


def _halves(now: Situation, least: int) -> Iterator[int]:
    """Of the tokens of a pass, down to `least`, or to the longest row or pair."""
    batch = now.training.batch
    tokens, least = batch.tokens, max(least, batch.micro // now.run.train.per_device_batch_size)
    while now.backend == "native" and tokens > least:
        tokens = max(least, tokens // 2)
        yield tokens


def _eight_bit(now: Situation) -> Iterator[Proposal]:
    if now.run.train.optimizer.startswith("adamw_torch"):
        yield ("train.optimizer=adamw_8bit",), "states rounded to 8 bits; needs the extra quant"


def _lora(now: Situation) -> Iterator[Proposal]:
    if now.run.model.lora is None:
        adapter = f"model.{'peft_enabled' if isinstance(now.run, SFTRunConfig) else 'use_peft'}=true"
        whole = ("train.optimizer=adamw_torch_fused",) if now.run.train.optimizer in SPLIT_OPTIMIZERS else ()
        yield (adapter, *whole, *_all_kept(now)), "an adapter is trained, not all weights"


def _four_bit(now: Situation) -> Iterator[Proposal]:
    if now.run.model.lora is not None and not now.run.model.quantization:
        yield (
            ("model.quantization={load_in_4bit: true}", *_all_kept(now)),
            "a base rounded to 4 bits; needs the extra quant",
        )


def _all_kept(now: Situation) -> tuple[str, ...]:
    """What takes selective checkpointing back, which some settings exclude."""
    return () if now.run.model.selective_checkpointing == "off" else ("model.selective_checkpointing=off",)


def _shorter(now: Situation) -> Iterator[Proposal]:
    length = now.run.model.max_seq_length
    while length >= 512:
        length //= 2
        yield (f"model.max_seq_length={length}",), "longer rows are cut"


KINDS: tuple[Kind, ...] = (
    _fused, _half, _long_passes, _selective, _split, _checkpointing, _precomputed, _short_passes, _micro, _eight_bit, _lora, _four_bit, _shorter,
)  # fmt: skip
