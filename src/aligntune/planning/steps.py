"""How long is a run? Optimiser steps, evaluations, checkpoints and their size on disk, from the settings and the row count."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aligntune.config import applies
from aligntune.config.algorithms import MetaESConfig
from aligntune.config.rl import TrainingConfig
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.config.sft import TrainingConfig as SFTTrainingConfig
from aligntune.planning.memory import OPTIMIZERS, Training
from aligntune.planning.rows import count_rows, file_bytes
from aligntune.trainers.online_plan import Plan, make_plan

BYTES_PER_TOKEN = 4
"""Of English text under today's vocabularies: only used to guess how many sequences packing leaves."""


@dataclass(frozen=True)
class Rollouts:
    """Online algorithms: a phase samples completions and serves `steps` optimiser steps, over all processes."""

    prompts: int
    completions: int
    completion_tokens: int
    """At most, for each phase."""
    passes: int
    steps: int


@dataclass(frozen=True)
class Steps:
    """Counts of a run; None where they depend on rows that cannot be counted here."""

    rows: int | None
    sequences: int | None
    """Rows after packing."""
    guessed: bool
    """Whether `sequences` is an estimate."""
    global_batch: int
    """Rows (pairs, completions) of an optimiser step over all processes."""
    tokens_per_step: int
    """At most, padding included."""
    steps: int | None
    evaluations: int | None
    checkpoints: int | None
    """Written; `kept` of them stay."""
    kept: int | None
    checkpoint_bytes: float
    rollouts: Rollouts | None = None
    evolution: tuple[int, int] | None = None
    """Meta-ES: trainings before the run's own, at most (`patience` may end them), and the steps of each."""


def count_steps(run: SFTRunConfig | RLRunConfig, training: Training, processes: int) -> Steps:
    """The counts of `run`."""
    train, schedule = run.train, run.schedule
    rows = count_rows(list(run.sources))
    sequences, guessed = _sequences(run, rows)
    per_pass = _steps_of_a_pass(run, sequences, processes)
    batch = train.per_device_batch_size * train.gradient_accumulation_steps * processes
    rollouts = _rollouts(run, processes)
    steps = optimizer_steps(run, processes)
    passes = None if steps is None or per_pass is None else math.ceil(steps / per_pass)
    evaluations = _times(schedule.eval_strategy, schedule.eval_every, steps, passes)
    if schedule.eval_strategy != "no":
        evaluations = None if evaluations is None else evaluations + 1  # before the first step
    elif run.has_eval:
        evaluations = 1  # after the last one
    checkpoints = _times(schedule.save_strategy, schedule.save_every, steps, passes)
    kept = (
        checkpoints
        if checkpoints is None or schedule.save_total_limit is None
        else min(checkpoints, schedule.save_total_limit)
    )
    tokens = training.batch.micro * train.gradient_accumulation_steps * processes
    return Steps(
        rows,
        sequences,
        guessed,
        batch,
        tokens,
        steps,
        evaluations,
        checkpoints,
        kept,
        checkpoint_bytes(training),
        rollouts,
        _evolution(train),
    )


def _evolution(train: TrainingConfig | SFTTrainingConfig) -> tuple[int, int] | None:
    return (train.trainings, train.T) if isinstance(train, MetaESConfig) else None


def optimizer_steps(run: SFTRunConfig | RLRunConfig, processes: int) -> int | None:
    """Optimiser steps of the run; None where they depend on rows that cannot be counted here."""
    if run.train.max_steps is not None:
        return int(run.train.max_steps)
    sequences, _ = _sequences(run, count_rows(list(run.sources)))
    per_pass = _steps_of_a_pass(run, sequences, processes)
    return None if per_pass is None else per_pass * (run.train.epochs or 1)


def _steps_of_a_pass(run: SFTRunConfig | RLRunConfig, sequences: int | None, processes: int) -> int | None:
    train, rollouts = run.train, _rollouts(run, processes)
    if sequences is None:
        return None
    if rollouts is not None:
        return math.ceil(sequences / rollouts.prompts) * rollouts.steps
    micro = sequences / (train.per_device_batch_size * processes)
    whole = math.floor(micro) if getattr(train, "dataloader_drop_last", False) else math.ceil(micro)
    return max(1, math.ceil(whole / train.gradient_accumulation_steps))


def checkpoint_bytes(t: Training) -> float:
    """Trained weights in their format and the optimiser's states (paged ones too); beside an adapter, nothing of its base."""
    state = OPTIMIZERS[t.optimizer][0]
    if t.optimizer.startswith("paged"):
        state = {"paged_adamw_8bit": 0.508, "paged_lion_32bit": 1, "paged_lion_8bit": 0.254}.get(t.optimizer, 2)
    values = 0 if t.value is None else t.value.parameters
    return t.trained * (t.trained_parameters + values) * (1 + state)


def _times(strategy: str, every: int, steps: int | None, passes: int | None) -> int | None:
    """How often something happens that also happens at the end."""
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return passes
    return None if steps is None else math.ceil(steps / every)


def _sequences(run: SFTRunConfig | RLRunConfig, rows: int | None) -> tuple[int | None, bool]:
    if not (isinstance(run, SFTRunConfig) and run.train.packing):
        return rows, False
    size = file_bytes(list(run.sources))
    if rows is None or size is None:
        return None, True
    return min(rows, max(1, math.ceil(size / BYTES_PER_TOKEN / run.model.max_seq_length))), True


def _rollouts(run: SFTRunConfig | RLRunConfig, processes: int) -> Rollouts | None:
    if not isinstance(run, RLRunConfig) or run.algorithm not in applies.ONLINE:
        return None
    plan = phases_of(run)
    completions = plan.completions * processes
    tokens = completions * run.train.max_completion_length
    return Rollouts(plan.prompts * processes, completions, tokens, plan.passes, plan.steps)


def phases_of(run: RLRunConfig) -> Plan:
    """How rollout phases and optimiser steps fit together; a `ConfigError` when they do not."""
    return make_plan(run, run.algorithm in applies.GROUP_RELATIVE)
