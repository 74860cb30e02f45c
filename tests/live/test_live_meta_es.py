"""Every setting of Meta-ES's own table acts, or is refused. What it shares with Neural Mirror GRPO is in test_live_online."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from aligntune.algorithms import evolution as es
from aligntune.config.algorithms import MetaESConfig, NeuralMirrorConfig
from live.cases import Case, Observe, observed

ROOT: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = ROOT["root"] = tmp_path_factory.mktemp("live-es")
    tiny.write_model(root / "model")
    tiny.write_rows(root / "prompts.jsonl", [{"prompt": f"say {word}", "answer": word} for word in tiny.WORDS])


def spread(completion: str, *, scale: float = 1.0) -> float:
    """A reward that tells completions apart."""
    return scale * (sum(map(ord, completion)) % 7)


def letters(completion: str) -> float:
    return sum(map(ord, completion)) % 17 / 16


def timed(completion: str, *, timeout_s: float = 1.0) -> float:
    """The time it was given."""
    return timeout_s


def evolved(s: Any) -> Any:
    """Generation by generation, what a whole run evolved."""
    s.train(overwrite=True)
    saved = json.loads(s.directory.evolution.read_text())
    return [(record["fitness"], record["sigma"], record["numbers"]) for record in saved["history"]]


def steps(s: Any) -> int:
    """Optimiser steps of a candidate."""
    return int(s.candidates(s.genome.start(), 0).steps)


def left(s: Any) -> list[str]:
    s.train(overwrite=True)
    return sorted(path.name for path in s.directory.path.iterdir())


def first(s: Any) -> list[float]:
    found: list[float] = s.evolution().state.center.tolist()
    return found


def progress(s: Any) -> int:
    """Centres since the last progress, after fitnesses of 0.1 and 0.5."""
    state = s.evolution().state
    for fitness in (0.1, 0.5):
        state = es.observe(state, s.config.train, fitness)
    return state.stale


def stepped(s: Any) -> Any:
    """The candidates of the generation after one in which they got 0.1 and 0.5."""
    config = s.config.train
    state = es.update(s.evolution().state, config, [0.1, 0.5])
    return [candidate.parameters.tolist() for candidate in es.candidates(state, config)]


class Remembered:
    """A state file of two more generations, made by the same settings."""

    def __repr__(self) -> str:
        return "state of another run"


def resumed(s: Any) -> int:
    return s.evolution().state.generation


def processes(s: Any) -> Any:
    return s.describe().splitlines()[-1]


def answers(s: Any) -> Any:
    """Fitness of the untrained policy under two seeds."""
    return [s.fitness(seed) for seed in (0, 1)]


TWO: Sequence[dict[str, Any]] = [
    {"type": "live.test_live_meta_es:spread"},
    {"type": "live.test_live_meta_es:letters", "weight": 2.0},
]
MIRROR = {"train.target": "mirror", "train.mirror_coefficient": 1.0}
ONE = {"train.meta_iterations": 1}
STALE = {"train.meta_iterations": 3, "train.min_delta": 10.0}
WANDB = {"logging.loggers": ["wandb", "tensorboard"]}

OWN: list[tuple[str, Any, Observe, dict[str, Any], Any]] = [
    ("meta_iterations", 2, lambda s: len(evolved(s)), ONE, None),
    ("patience", 1, lambda s: len(evolved(s)), STALE, 2),
    ("min_delta", 0.9, progress, {}, None),
    ("init_scale", 0.05, first, MIRROR, None),
    ("N", 4, lambda s: s.describe(), {}, None),
    ("T", 2, steps, {}, None),
    ("sigma", 0.02, stepped, {}, None),
    ("sigma_decay", 0.5, stepped, {}, None),
    ("alpha", 0.5, stepped, {}, None),
    ("debug_mode", True, left, ONE, None),
    ("eval_timeout", 3, lambda s: s.fitness(0), {"train.verifier": "live.test_live_meta_es:timed"}, None),
    ("eval_max_tokens", 2, lambda s: s.fitness.params.max_new_tokens, {}, None),
    ("eval_k", 50, answers, {}, None),
    ("eval_temperature", 3.0, answers, {"train.eval_k": 50}, None),
    ("num_workers", 2, processes, {}, None),
    ("no_wandb", True, lambda s: s.loggers(), WANDB, None),
    ("wandb_project", "mine", lambda s: s.logger_options(), WANDB, None),
    ("resume", Remembered(), resumed, ONE, None),
    ("target", "mirror", lambda s: s.genome.size, {"train.mirror_coefficient": 1.0}, None),
    ("shaping", "none", stepped, {}, None),
    ("verifier", "live.test_live_meta_es:timed", lambda s: s.fitness(0), {}, None),
    ("evolved_params", {"spread.scale": [0.5, 2.0]}, lambda s: list(s.genome.numbers(s.genome.start())), {}, None),
    ("fitness_share", 0.5, lambda s: len(s.fitness_rows), {}, None),
    ("mirror_coefficient", 9.0, lambda s: s.candidates(s.genome.start(), 0).log[-1]["loss/mirror"], {"train.debug_mode": True, "train.mirror_map": "log_l2", "train.T": 3}, None),
]  # fmt: skip


@pytest.mark.parametrize("case", OWN, ids=lambda case: case[0])
def test_setting_of_meta_es_acts(case: tuple[str, Any, Observe, dict[str, Any], Any], tmp_path: Path) -> None:
    name, value, observe, base, against = case
    root = ROOT["root"]
    common = {
        "algorithm": "meta_es", "model.name_or_path": str(root / "model"), "model.precision": "fp32", "model.use_peft": False,
        "dataset.name": str(root / "prompts.jsonl"), "logging.output_dir": str(tmp_path / "out"), "logging.loggers": "none", "backend": "native",
        "train.per_device_batch_size": 8, "train.num_generations": 4, "train.max_completion_length": 4, "train.temperature": 1.0,
        "train.mask_truncated_completions": False, "train.max_steps": 1, "train.save_strategy": "no", "train.learning_rate": 1e-2,
        "train.verifier": "live.test_live_meta_es:letters", "train.N": 2, "train.T": 1, "train.top_p": 1.0, "train.eval_max_tokens": 4, "rewards": list(TWO),
    }  # fmt: skip
    if name in ("N", "T", "eval_max_tokens"):
        del common[f"train.{name}"]
    if isinstance(value, Remembered):
        former = {**common, **base, "logging.output_dir": str(tmp_path / "former")}
        observed(former, Case("train.meta_iterations", 1, evolved, {}, 2))
        value = str(tmp_path / "former" / "evolution.json")
    before, after = observed(common, Case(f"train.{name}", value, observe, base, against))
    assert before != after


def test_every_setting_of_meta_es_has_a_case() -> None:
    own = set(MetaESConfig.model_fields) - set(NeuralMirrorConfig.model_fields)
    assert own | {"mirror_coefficient"} == {case[0] for case in OWN}
