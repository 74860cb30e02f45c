"""Meta-ES: evolve the rewards, the mirror map, or both; then train the policy with the best of them.

A generation measures its centre and `N` candidates around it (`algorithms.evolution`): each trains the policy `T` steps from
the same weights (`candidates`), and the verifier scores its answers to held-out prompts. The best centre's rewards and map
then train the policy that is saved, as in any online run.

`evolution.json` holds the state after each generation, exact to the bit, with the settings that it depends on: a run that
was killed goes on from there, and `train.resume` continues that of another run.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from aligntune.algorithms import base as algorithms
from aligntune.algorithms import evolution as es
from aligntune.algorithms.evolution import EvolutionState
from aligntune.algorithms.mirror_pictures import mirror_sections
from aligntune.config.algorithms import MetaESConfig
from aligntune.config.dump import origin_rows
from aligntune.config.enums import AlgorithmType
from aligntune.data import rows_fingerprint
from aligntune.errors import ConfigError, DataError, RewardError
from aligntune.reporting.sinks import logger_names
from aligntune.reporting.trail import dumps
from aligntune.rewards import RewardSet
from aligntune.rewards.base import get as get_reward
from aligntune.rollouts.base import SamplingParams
from aligntune.trainers.candidates import Candidates, Fitness, Outcome
from aligntune.trainers.evolution_report import evolution_sections
from aligntune.trainers.genome import Genome
from aligntune.trainers.online import OnlineSession
from aligntune.trainers.workers import Jobs, Workers

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
        train, steps = self.config.train, Evolution(self)
        self.reference_of_candidates()
        workers = Workers(self, train.num_workers) if train.num_workers > 1 and not steps.finished else None
        try:
            while not steps.finished:
                steps.generation(workers.measure if workers is not None else self._measure)
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

    def reference_of_candidates(self) -> None:
        """The reference is the policy before anything is trained."""
        self.candidates  # noqa: B018
        if self.spec.needs(self.config.train).reference:
            self.reference  # noqa: B018

    def _measure(self, jobs: Jobs, done: Callable[[int, Outcome], None]) -> list[Outcome]:
        found = []
        for place, (theta, seed) in enumerate(jobs):
            found.append(self.candidates(theta, seed))
            done(place, found[-1])
        return found

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


class Evolution:
    """The evolution of one run: its state, its history (one record a generation), and their files."""

    def __init__(self, session: MetaESSession) -> None:
        self.session, self.genome, self.recorder = session, session.genome, session.recorder
        self.config: MetaESConfig = session.config.train
        self.state: EvolutionState = es.start(self.genome.start(), self.config)
        self.history: list[dict[str, Any]] = []
        self.observed = False
        """Whether the present centre's fitness is known."""
        self.centre_fitness: float | None = None
        self._spent: Mapping[str, Any] = {}
        """The record of a generation that is taken up again: its centre is measured, and its cost counts."""
        self.last_error = ""
        self.problem = session.problem()
        own = session.directory.evolution
        if own.exists() or self.config.resume is not None:
            self._load(own if own.exists() else _state_file(self.config.resume or ""))

    @property
    def finished(self) -> bool:
        return self.observed and es.finished(self.state, self.config)

    def generation(self, measure: Callable[[Jobs, Callable[[int, Outcome], None]], list[Outcome]]) -> None:
        """Measure the centre and, unless it is the last, the candidates around it; take a step; save."""
        state, seed, started = self.state, es.training_seed(self.state, self.config), time.perf_counter()
        around = es.candidates(state, self.config) if state.generation < self.config.meta_iterations else []
        centre = [] if self.observed else [state.center]
        jobs = [(theta, seed) for theta in [*centre, *(candidate.parameters for candidate in around)]]
        finished = 0

        def done(place: int, outcome: Outcome) -> None:
            nonlocal finished
            finished += 1
            self._progress(state.generation, finished, len(jobs))
            self._debug(state, jobs[place][0], place - len(centre), outcome)

        self._progress(state.generation, 0, len(jobs))
        outcomes = measure(jobs, done)
        if centre:
            self.centre_fitness = outcomes[0].fitness
            self.state, self.observed = es.observe(self.state, self.config, self.centre_fitness), True
        fitness = [outcome.fitness for outcome in outcomes[len(centre) :]]
        self._note_errors(state.generation, outcomes)
        record = self._record(state, outcomes[: len(centre)], outcomes[len(centre) :])
        record["perf/seconds"] = time.perf_counter() - started
        if not es.finished(self.state, self.config):
            if not es.surviving_pairs(fitness):
                raise RewardError(
                    f"every candidate pair of generation {state.generation} failed, so there is nothing to learn from. The first "
                    f"error: {self.last_error}. Mend that; where training diverges, fewer steps (T), a smaller sigma or a smaller "
                    "learning_rate help"
                )
            self.state, self.observed = es.update(self.state, self.config, fitness), False
        self.history.append(record)
        self._save()
        self._show(record)

    def _record(self, state: EvolutionState, centre: Sequence[Outcome], around: Sequence[Outcome]) -> dict[str, Any]:
        """What is kept of a generation; names with `perf/` differ between two equal runs."""
        alive = [outcome.fitness for outcome in around if outcome.fitness is not None]
        everyone = [*centre, *around]
        found = {
            "generation": state.generation,
            "fitness": self.centre_fitness,
            "candidates/mean": sum(alive) / len(alive) if alive else None,
            "candidates/min": min(alive, default=None),
            "candidates/max": max(alive, default=None),
            "candidates/failed": len(around) - len(alive),
            "best_fitness": self.state.best_fitness,
            "sigma": es.sigma(state, self.config),
            "cost/trainings": len(everyone),
            "cost/steps": sum(outcome.steps for outcome in everyone),
            "cost/tokens": sum(outcome.tokens for outcome in everyone),
            "perf/training_seconds": sum(outcome.seconds for outcome in everyone),
            "numbers": self.genome.numbers(state.center),
        }
        for name in ("cost/trainings", "cost/steps", "cost/tokens", "perf/training_seconds"):
            found[name] += self._spent.get(name, 0)
        self._spent = {}
        return found

    def _note_errors(self, generation: int, outcomes: Sequence[Outcome]) -> None:
        errors = [outcome.error for outcome in outcomes if outcome.error]
        if errors:
            self.last_error = errors[0]
            self.recorder.note(
                f"generation {generation}: {len(errors)} training(s) failed, the first with {errors[0]}", "warning"
            )

    def _progress(self, generation: int, finished: int, of: int) -> None:
        size, total = self.config.N + 1, (self.config.meta_iterations + 1) * (self.config.N + 1) - self.config.N
        self.recorder.progress(generation * size + finished + (size - of if self.observed else 0), total, "evolution")

    def _show(self, record: Mapping[str, Any]) -> None:
        """Tell the recorder: numbers of this generation as metrics of the split `evolution`."""
        values = {
            name: value for name, value in record.items() if name not in ("generation", "numbers") and value is not None
        }
        values |= {f"evolved/{name}": value for name, value in record["numbers"].items()}
        self.recorder.metrics(record["generation"], values, split="evolution")

    def _debug(self, state: EvolutionState, theta: Tensor, candidate: int, outcome: Outcome) -> None:
        if self.config.debug_mode:
            line = {"generation": state.generation, "candidate": candidate, **vars(outcome)}
            line |= {"numbers": self.genome.numbers(theta), "theta": theta.tolist()}
            with (self.session.directory.path / "candidates.jsonl").open("a", encoding="utf-8") as file:
                file.write(dumps(line) + "\n")

    # Files ----------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        directory = self.session.directory
        saved = {"state": self.state.to_dict(self.config), "observed": self.observed}
        directory.write_json("evolution.json", saved | {"history": self.history, "problem": self.problem})
        directory.write_text("evolution.jsonl", "".join(dumps(record) + "\n" for record in self.history))

    def _load(self, path: Path) -> None:
        """Continue a saved evolution; ConfigError names the settings in which it differs from this run."""
        saved = _read_state(path)
        differing = [
            name
            for name in {**saved["problem"], **self.problem}
            if saved["problem"].get(name) != self.problem.get(name)
        ]
        if differing:
            shown = ", ".join(
                f"{name} (saved {saved['problem'].get(name)}, now {self.problem.get(name)})" for name in differing
            )
            raise ConfigError(
                f"{path} belongs to another config: {shown}. Use its settings, or start anew without resume"
            )
        self.state = EvolutionState.from_dict(saved["state"], self.config, self.genome.size)
        self.observed, self.history = saved["observed"], saved["history"]
        if self.observed:  # it had ended here
            self.centre_fitness = self.history[-1]["fitness"]
            if not self.finished:
                self._spent = self.history.pop()
        self._drop_debug_of_the_future()
        known = {row["step"] for row in self.session.directory.metrics.rows() if row.get("split") == "evolution"}
        for record in self.history:  # the trail of a run that starts again from here has lost them
            if record["generation"] not in known:
                self._show(record)
        self.recorder.note(f"the evolution goes on at generation {self.state.generation} ({path})")

    def _drop_debug_of_the_future(self) -> None:
        path = self.session.directory.path / "candidates.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["generation"] < self.state.generation]
            self.session.directory.write_text("candidates.jsonl", "".join(f"{line}\n" for line in kept))


def _state_file(given: str) -> Path:
    path = Path(given).expanduser()
    path = path / "evolution.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"train.resume: there is no {path}; give the folder of a Meta-ES run, or its evolution.json")
    return path


def _read_state(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged or no text ({error}); resume from another evolution.json") from error
    if not isinstance(saved, dict) or not {"state", "observed", "history", "problem"} <= saved.keys():
        raise ConfigError(f"{path}: is not the evolution.json of a Meta-ES run; resume from that of one")
    return saved
