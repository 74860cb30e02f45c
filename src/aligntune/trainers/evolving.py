"""The evolution of a Meta-ES run: generation by generation, each of them kept.

`evolution.json` holds the state after each generation, exact to the bit, with the settings that it depends on: a run that
was killed goes on from there, and `train.resume` continues that of another run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aligntune.algorithms import evolution as es
from aligntune.algorithms.evolution import EvolutionState
from aligntune.config.algorithms import MetaESConfig
from aligntune.errors import ConfigError, RewardError
from aligntune.reporting import Recorder, RunDirectory
from aligntune.reporting.trail import dumps
from aligntune.trainers.candidates import Measure, Outcome
from aligntune.trainers.genome import Genome


class Evolution:
    """The evolution of one run: its state, its history (one record a generation), and their files.

    `problem`: what it depends on, by name; a saved evolution of another problem is not continued.
    """

    def __init__(
        self, genome: Genome, config: MetaESConfig, recorder: Recorder, directory: RunDirectory, problem: dict[str, Any]
    ) -> None:
        self.genome, self.config, self.problem = genome, config, problem
        self.recorder, self.directory = recorder, directory
        self.state = es.start(genome.start(), config)
        self.history: list[dict[str, Any]] = []
        self.observed = False
        """Whether the present centre's fitness is known."""
        self.centre_fitness: float | None = None
        self._spent: Mapping[str, Any] = {}
        """The record of a generation that is taken up again: its centre is measured, and its cost counts."""
        self.last_error = ""
        own = directory.evolution
        if own.exists() or config.resume is not None:
            self._load(own if own.exists() else _state_file(config.resume or ""))

    @property
    def finished(self) -> bool:
        return self.observed and es.finished(self.state, self.config)

    def generation(self, measure: Measure) -> None:
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
        self._note_equal(state.generation, fitness)
        record = self._record(state, outcomes[: len(centre)], outcomes[len(centre) :])
        record["perf/seconds"] = time.perf_counter() - started
        if not es.finished(self.state, self.config):
            try:
                self.state, self.observed = es.update(self.state, self.config, fitness), False
            except RewardError as error:
                raise RewardError(
                    f"generation {state.generation}: {error}. The first of them: {self.last_error}"
                ) from None
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

    def _note_equal(self, generation: int, fitness: Sequence[float | None]) -> None:
        if len(fitness) > 1 and len(set(fitness)) == 1 and None not in fitness:
            self.recorder.note(
                f"generation {generation}: all {len(fitness)} candidates have the fitness {fitness[0]:g}, so nothing is learnt "
                "from them: the verifier should tell their answers apart; more training steps (T), a larger sigma or more "
                "evaluation rows may help",
                "warning",
            )

    def _progress(self, generation: int, finished: int, of: int) -> None:
        size = self.config.N + 1
        before = generation * size + (size - of if self.observed else 0)
        self.recorder.progress(before + finished, self.config.trainings, "evolution")

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
            with (self.directory.path / "candidates.jsonl").open("a", encoding="utf-8") as file:
                file.write(dumps(line) + "\n")

    # Files ----------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        saved = {"state": self.state.to_dict(self.config), "observed": self.observed}
        self.directory.write_json("evolution.json", saved | {"history": self.history, "problem": self.problem})
        self.directory.write_text("evolution.jsonl", "".join(dumps(record) + "\n" for record in self.history))

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
        known = {row["step"] for row in self.directory.metrics.rows() if row.get("split") == "evolution"}
        for record in self.history:  # the trail of a run that starts again from here has lost them
            if record["generation"] not in known:
                self._show(record)
        self.recorder.note(f"the evolution goes on at generation {self.state.generation} ({path})")

    def _drop_debug_of_the_future(self) -> None:
        path = self.directory.path / "candidates.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["generation"] < self.state.generation]
            self.directory.write_text("candidates.jsonl", "".join(f"{line}\n" for line in kept))


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
