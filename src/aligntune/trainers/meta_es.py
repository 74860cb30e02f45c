"""Meta-ES: evolve the rewards, the mirror map, or both; then train the policy with the best of them.

A generation measures its centre and `N` candidates around it (`algorithms.evolution`): each trains the policy `T` steps from
the same weights (`candidates`), and the verifier scores its answers to held-out prompts. The best centre's rewards and map
then train the policy that is saved, as in any online run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from aligntune.algorithms import base as algorithms
from aligntune.algorithms.mirror_pictures import mirror_sections
from aligntune.config.dump import origin_rows
from aligntune.config.enums import AlgorithmType
from aligntune.data import rows_fingerprint
from aligntune.errors import ConfigError, DataError, RewardError
from aligntune.reporting.sinks import logger_names
from aligntune.rewards import RewardSet
from aligntune.rewards.base import get as get_reward
from aligntune.rollouts.base import SamplingParams
from aligntune.trainers.candidates import Candidates, Fitness
from aligntune.trainers.evolution_report import evolution_sections
from aligntune.trainers.evolving import Evolution
from aligntune.trainers.genome import Genome
from aligntune.trainers.online import OnlineSession
from aligntune.trainers.workers import Workers

MAY_CHANGE = {
    "logging", "eval_dataset", "eval_split", "backend", "fallback", "skip_backends", "train.meta_iterations", "train.patience", "train.min_delta",
    "train.num_workers", "train.debug_mode", "train.no_wandb", "train.wandb_project", "train.resume", "train.max_steps", "train.epochs",
    "train.eval_strategy", "train.eval_interval", "train.save_strategy", "train.save_interval", "train.save_total_limit",
    "train.logging_steps", "train.logging_strategy", "train.load_best_model_at_end", "train.metric_for_best_model", "train.greater_is_better",
}  # fmt: skip
"""Settings that a continued evolution need not share with the saved one."""


class MetaESSession(OnlineSession):
    """A run whose policy is trained last, with what evolved."""

    config: Any

    # Parts ----------------------------------------------------------------------------------------------------------

    @cached_property
    def spec(self) -> algorithms.AlgorithmSpec:
        return self.checked_spec(algorithms.get(AlgorithmType.NEURAL_MIRROR_GRPO.value))

    @cached_property
    def train_rows(self) -> Any:
        return self._split[0]

    @cached_property
    def fitness_rows(self) -> Any:
        """The prompts that the verifier judges candidates by; no candidate trains on one of them."""
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[Any, Any]:
        rows, train = self.training_rows(), self.config.train
        texts = list(dict.fromkeys(rows["prompt_text"]))
        random.Random(train.data_seed).shuffle(texts)
        held = set(texts[: max(1, round(train.fitness_share * len(texts)))])
        if len(held) == len(texts):
            raise DataError(
                f"{len(texts)} different prompts cannot be split into training and fitness prompts: give more"
            )
        first: dict[str, int] = {}
        kept = []
        for place, text in enumerate(rows["prompt_text"]):
            if text not in held:
                kept.append(place)
            else:
                first.setdefault(text, place)
        return rows.select(kept), rows.select(sorted(first.values()))

    @cached_property
    def rewards(self) -> RewardSet:
        """The rewards as configured, the verifier first: with weight 0 where it is none of them, so that it is measured."""
        found = super().rewards
        entry = next((entry for entry in found.entries if entry.name == self._verifier_name), None)
        if entry is None:
            entry = replace(self.verifier.entries[0], weight=0.0)
        found.entries = [entry, *(other for other in found.entries if other is not entry)]
        return found

    @property
    def _verifier_kind(self) -> Any:
        """`train.verifier`, or the one reward there is."""
        train = self.config.train
        return train.verifier if train.verifier is not None else self.config.rewards[0].type

    @property
    def _verifier_name(self) -> str:
        return get_reward(self._verifier_kind).name

    @cached_property
    def verifier(self) -> RewardSet:
        """The verifier alone, unweighted: with the params of the reward of that name, and `eval_timeout` where it takes one."""
        train = self.config.train
        params: dict[str, Any] = next(
            (e.params for e in self.config.rewards if get_reward(e.type).name == self._verifier_name), {}
        )
        found = RewardSet([{"type": self._verifier_kind, "params": dict(params)}], tokenizer=self.tokenizer)
        caller = found.entries[0].caller
        if "timeout_s" in caller.signature.defaults:
            caller.params = {"timeout_s": float(train.eval_timeout), **caller.params}
        elif train.is_set("eval_timeout"):
            raise ConfigError(
                f"train.eval_timeout: the verifier {self._verifier_name} has no time limit (timeout_s) to set"
            )
        return found

    @cached_property
    def genome(self) -> Genome:
        return Genome(self.config.train, self.rewards, self.spec, self._verifier_name)

    @cached_property
    def fitness(self) -> Fitness:
        """Judges the policy as it is."""
        train = self.config.train
        longest = max(len(row) for row in self.fitness_rows["prompt_ids"])
        greedy = train.eval_k == 1
        params = SamplingParams(
            max_new_tokens=max(1, min(train.eval_max_tokens, self.config.model.max_seq_length - longest)),
            temperature=0.0 if greedy else train.eval_temperature, top_k=0 if greedy else train.eval_k,
            stop_token_ids=self.stop_token_ids,
        )  # fmt: skip
        return Fitness(self, self.fitness_rows, self.verifier, params)

    @cached_property
    def candidates(self) -> Candidates:
        """Measures candidates in this process."""
        return Candidates(self)

    @property
    def source(self) -> Any:
        """The backend that loads the policy."""
        return self._backend

    def loggers(self) -> str | Sequence[str]:
        names = logger_names(super().loggers())
        return [name for name in names if name != "wandb"] if self.config.train.no_wandb else names

    def logger_options(self) -> dict[str, Any]:
        return {"project": self.config.train.wandb_project}

    def _check_settings(self) -> None:
        super()._check_settings()
        self.genome  # noqa: B018  (what evolves, and the verifier, before any model)

    def describe(self) -> str:
        train = self.config.train
        return (
            f"{super().describe()}\nbefore that {train.meta_iterations} generations of 1 + {train.N} trainings of {train.T} steps in "
            f"{train.num_workers} process(es), which evolve {self.genome.size} numbers; fitness: {self._verifier_name} on "
            f"{len(self.fitness_rows)} held-out prompts"
        )

    # Training -------------------------------------------------------------------------------------------------------

    def build_trainer(self) -> Any:
        best = self.evolve()
        self.rewards, self.spec = self.genome.rewards(best), self.genome.spec(best)
        mirror = self.genome.mirror(best)
        if mirror is not None:
            mirror.save(self.directory.path / "mirror_map.json")
        return super().build_trainer()

    def evolve(self) -> Tensor:
        """Evolve to the end, from the saved state where there is one; returns the best centre."""
        count, steps = self.config.train.num_workers, self.evolution()
        self.reference_of_candidates()
        workers = Workers(self, count) if count > 1 and not steps.finished else None
        try:
            while not steps.finished:
                steps.generation((workers or self.candidates).measure)
        finally:
            if workers is not None:
                workers.close()
            for section in self._sections(steps) if steps.history else []:
                self.recorder.section(**section)
            self.candidates.close()
        if steps.state.best_fitness is None:
            raise RewardError(
                f"no centre of the evolution could be measured: {steps.last_error or 'see the notes above'}"
            )
        return steps.state.best

    def evolution(self) -> Evolution:
        """The evolution of this run as its folder has it, or its start."""
        return Evolution(self.genome, self.config.train, self.recorder, self.directory, self.problem())

    def reference_of_candidates(self) -> None:
        """The reference is the policy before anything is trained."""
        self.candidates  # noqa: B018
        if self.spec.needs(self.config.train).reference:
            self.reference  # noqa: B018

    def _sections(self, steps: Evolution) -> list[dict[str, Any]]:
        best = steps.state.best
        found = evolution_sections(steps.history, self.genome.numbers(self.genome.start()), self.genome.numbers(best))
        mirror = self.genome.mirror(best)
        return found if mirror is None else [*found, *mirror_sections(mirror.divergence, mirror, "Evolved: ")]

    def problem(self) -> dict[str, Any]:
        """What an evolution depends on: settings by path, and the prompts."""
        rows = {row["path"]: row["value"] for row in origin_rows(self.resolved)}
        kept = {path: value for path, value in rows.items() if not {path, path.split(".")[0]} & MAY_CHANGE}
        return kept | {
            "fitness prompts": rows_fingerprint(self.fitness_rows),
            "prompts": rows_fingerprint(self.train_rows),
        }
