"""How good is a candidate? Train the policy `T` steps with its rewards and its map, then let the verifier judge.

Every candidate starts from the same weights, which stay in memory: the trained ones (LoRA adapter, or the whole of a small
model) are set back before each, the frozen ones are shared. Nothing is read from disk.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback

from aligntune.errors import RewardError
from aligntune.rewards import RewardSet
from aligntune.rollouts.base import SamplingParams
from aligntune.trainers.arguments import training_arguments
from aligntune.trainers.compiling import compile_model
from aligntune.trainers.rollout_phase import reward_arguments

if TYPE_CHECKING:
    from aligntune.trainers.meta_es import MetaESSession


@dataclass
class Outcome:
    """What became of a candidate. `fitness` is None where it failed, and `error` says why. `log`: one entry a step."""

    fitness: float | None = None
    error: str = ""
    reward: float | None = None
    """Mean of its own reward over its training."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


Jobs = Sequence[tuple[Tensor, int]]
"""(theta, seed) of each candidate."""
Done = Callable[[int, Outcome], None]
"""Told the place of a job, and what became of it."""
Measure = Callable[[Jobs, Done], list[Outcome]]
"""The outcome of each job, in order; `done` is told as they come."""


class StartWeights:
    """The trained weights of a model as they are now; `restore` sets them back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.saved = {name: weight.detach().clone() for name, weight in trained_weights(model)}

    @torch.no_grad()
    def restore(self) -> None:
        for name, weight in trained_weights(self.model):
            weight.copy_(self.saved[name])
            weight.grad = None


def trained_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


class Fitness:
    """The verifier's mean raw score of one answer to each held-out prompt. RewardError when it applies to none."""

    def __init__(self, session: MetaESSession, rows: Any, verifier: RewardSet, params: SamplingParams) -> None:
        self.session, self.rows, self.verifier, self.params = session, rows, verifier, params
        self.batch = session.eval_batch

    def __call__(self, seed: int) -> float:
        scores: list[float] = []
        for start in range(0, len(self.rows), self.batch):
            rows = [self.rows[at] for at in range(start, min(start + self.batch, len(self.rows)))]
            params = replace(self.params, seed=(seed + start) % 2**31)
            found = self.session.engine.generate([row["prompt_ids"] for row in rows], params)
            judged = self.verifier.score(*reward_arguments(rows, found.completion_ids, self.session.tokenizer, 1))
            scores += [score for score in judged.total if score is not None]
        if not scores:
            raise RewardError("the verifier applied to no answer (it returned None for all of them)")
        return sum(scores) / len(scores)


class Candidates:
    """Measures candidates in this process, one after another."""

    def __init__(self, session: MetaESSession) -> None:
        compile_model(session)
        self.session, self.start = session, StartWeights(session.model)
        gc.freeze()  # after a candidate only its own objects are looked through; `close` undoes it

    def __call__(self, theta: Tensor, seed: int) -> Outcome:
        """Train and judge one candidate; whatever it raises becomes its error, except an interrupt."""
        started, outcome = time.perf_counter(), Outcome()
        try:
            with self.at_start():
                self._train(theta, seed % 2**31, outcome)
                outcome.fitness = self.session.fitness(seed)
        except Exception as error:  # noqa: BLE001 - the boundary to one candidate: the others go on
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.seconds = time.perf_counter() - started
        return outcome

    def measure(self, jobs: Jobs, done: Done) -> list[Outcome]:
        """See `Measure`."""
        found = []
        for place, (theta, seed) in enumerate(jobs):
            found.append(self(theta, seed))
            done(place, found[-1])
        return found

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside and afterwards the policy has its first weights."""
        self.restore()
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Set the policy back."""
        self.start.restore()
        self.session.engine.weights_changed()

    def close(self) -> None:
        """Set the policy back, for good."""
        self.restore()
        gc.unfreeze()

    def _train(self, theta: Tensor, seed: int, outcome: Outcome) -> None:
        session = self.session
        train, spec = session.config.train, session.genome.spec(theta)
        arguments = training_arguments(
            session.config, session.directory.checkpoints, session.precision, max_steps=train.T, seed=seed, data_seed=seed,
            logging_strategy="steps", logging_steps=1 if train.debug_mode else train.T, eval_strategy="no", eval_on_start=False,
            save_strategy="no", load_best_model_at_end=False, remove_unused_columns=False,
        )  # fmt: skip
        reference = session.reference if spec.needs(train).reference else None
        trainer = session.online_trainer(
            arguments,
            [session.engine],
            spec=spec,
            rewards=session.genome.rewards(theta),
            stream=session.stream(seed),
            reference=deepcopy(reference) if train.sync_ref_model else reference,
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        try:
            trainer.train()
            log = [entry for entry in trainer.state.log_history if "reward" in entry]
            outcome.reward = _mean(log, "reward")
            outcome.steps, outcome.tokens = trainer.state.global_step, trainer.tokens_of_all()
            outcome.log = log if train.debug_mode else []
            if not all(bool(weight.isfinite().all()) for _, weight in trained_weights(session.model)):
                raise RewardError("training made weights that are not finite")
        finally:
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            del trainer
            gc.collect()


def _mean(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [entry[name] for entry in entries if entry.get(name) is not None]
    return sum(values) / len(values) if values else None
