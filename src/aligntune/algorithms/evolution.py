"""How does a vector improve when its fitness can only be measured? Antithetic evolution strategies (arXiv 1703.03864).

    candidates: theta +- sigma_k eps_j, j = 1 .. N/2, sigma_k = sigma * sigma_decay^k
    theta <- theta + alpha / n * sum_j (z_j+ - z_j-) eps_j        (n candidates that gave a fitness, z their shaped fitness)

With shaping `none` the step is also divided by sigma, which makes it the gradient of the expected fitness; with ranks or
z-scores, whose unit is not the fitness, it is not (as in OpenAI's code and in 2509.24372).

The loop belongs to the trainer, one generation being `observe` (the centre's fitness: best kept, patience), `candidates` (to be
measured anywhere, in any order) and `update`. Noise comes from seeds, so the state is small, `to_dict` keeps it exactly, and a
run that was killed continues bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aligntune.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from aligntune.config.algorithms import MetaESConfig

SETTINGS = ("N", "T", "sigma", "sigma_decay", "alpha", "shaping", "init_scale", "target", "seed")
"""What a resumed run must share with the saved one; how long to go on (meta_iterations, patience) may change."""


@dataclass(frozen=True, eq=False)
class EvolutionState:
    """center, best: [D] float64. generation: updates made. best_fitness: of the best centre so far. bar: the fitness that
    counts as progress once exceeded by min_delta; stale: centres observed since then."""

    center: Tensor
    best: Tensor
    generation: int = 0
    best_fitness: float | None = None
    bar: float | None = None
    stale: int = 0

    def to_dict(self, config: MetaESConfig) -> dict[str, Any]:
        """Plain JSON values, exact to the bit, with the settings that the run depends on."""
        state = {name: getattr(self, name) for name in ("generation", "best_fitness", "bar", "stale")}
        settings = {name: getattr(config, name) for name in SETTINGS}
        return {"center": self.center.tolist(), "best": self.best.tolist(), **state, "settings": settings}

    @classmethod
    def from_dict(cls, data: dict[str, Any], config: MetaESConfig, size: int) -> EvolutionState:
        """The state of a saved run. ConfigError names the settings that differ from the saved ones."""
        saved = data["settings"]
        differing = [f"{name} (saved {saved.get(name)}, now {getattr(config, name)})"
                     for name in SETTINGS if saved.get(name) != getattr(config, name)]  # fmt: skip
        if len(data["center"]) != size:
            differing.append(f"number of evolved parameters (saved {len(data['center'])}, now {size})")
        if differing:
            raise ConfigError(
                f"the saved evolution belongs to another config: {', '.join(differing)}. Use its settings, or start anew"
            )
        center, best = (torch.tensor(data[name], dtype=torch.float64) for name in ("center", "best"))
        return cls(center, best, data["generation"], data["best_fitness"], data["bar"], data["stale"])


@dataclass(frozen=True, eq=False)
class Candidate:
    """One perturbed vector: `parameters` [D] = centre + sign * sigma * noise(pair)."""

    index: int
    pair: int
    sign: int
    parameters: Tensor


def start(parameters: Tensor | Sequence[float], config: MetaESConfig) -> EvolutionState:
    """The first state: `parameters` [D] plus normal noise of standard deviation `init_scale`."""
    theta = torch.as_tensor(parameters, dtype=torch.float64).detach().clone()
    theta = theta + config.init_scale * noise(derived_seed(config.seed, "start"), len(theta))
    return EvolutionState(center=theta, best=theta)


def sigma(state: EvolutionState, config: MetaESConfig) -> float:
    """Standard deviation of this generation's perturbations."""
    return float(config.sigma * config.sigma_decay**state.generation)


def candidates(state: EvolutionState, config: MetaESConfig) -> list[Candidate]:
    """The N candidates of this generation: pair j at 2j (plus) and 2j + 1 (minus)."""
    if config.N % 2:
        raise ConfigError(f"N is {config.N}; candidates come in antithetic pairs, so it must be even")
    size, spread = len(state.center), sigma(state, config)
    found = []
    for pair in range(config.N // 2):
        step = spread * _pair_noise(state, config, pair, size)
        found += [
            Candidate(2 * pair, pair, 1, state.center + step),
            Candidate(2 * pair + 1, pair, -1, state.center - step),
        ]
    return found


def training_seed(state: EvolutionState, config: MetaESConfig) -> int:
    """The seed that all candidates of a generation train and are evaluated with, so that they differ by theta alone."""
    return derived_seed(config.seed, "train", state.generation)


def observe(state: EvolutionState, config: MetaESConfig, fitness: float | None) -> EvolutionState:
    """Note the fitness of the centre (None or not finite: its evaluation failed, which counts as no progress)."""
    if fitness is None or not math.isfinite(fitness):
        return replace(state, stale=state.stale + 1)
    if state.best_fitness is None or fitness > state.best_fitness:
        state = replace(state, best=state.center, best_fitness=fitness)
    if state.bar is None or fitness > state.bar + config.min_delta:
        return replace(state, bar=fitness, stale=0)
    return replace(state, stale=state.stale + 1)


def finished(state: EvolutionState, config: MetaESConfig) -> bool:
    """All generations done, or `patience` centres in a row without an improvement of `min_delta`."""
    return state.generation >= config.meta_iterations or state.stale >= config.patience


def update(state: EvolutionState, config: MetaESConfig, fitness: Sequence[float | None]) -> EvolutionState:
    """The next generation, from the fitness of each candidate in the order of `candidates`.

    A candidate that failed (None or not finite) takes its partner with it: half a pair is not an estimate of anything.
    RewardError when no pair is left.
    """
    if len(fitness) != config.N:
        raise ValueError(f"{len(fitness)} fitness values for {config.N} candidates")
    pairs = surviving_pairs(fitness)
    if not pairs:
        raise RewardError(
            "every candidate pair of this generation failed, so there is nothing to learn from: read the candidates' errors;"
            " fewer training steps (T), a smaller sigma or a longer eval_timeout may help"
        )
    values = torch.tensor([[fitness[2 * pair], fitness[2 * pair + 1]] for pair in pairs], dtype=torch.float64)
    utility = shape(values.flatten(), config.shaping).view_as(values)
    direction = torch.zeros_like(state.center)
    for pair, (plus, minus) in zip(pairs, utility.tolist(), strict=True):
        direction = direction + (plus - minus) * _pair_noise(state, config, pair, len(direction))
    direction = direction / (2 * len(pairs))
    if config.shaping == "none":
        direction = direction / sigma(state, config)
    return replace(state, center=state.center + config.alpha * direction, generation=state.generation + 1)


def surviving_pairs(fitness: Sequence[float | None]) -> list[int]:
    """Indices of the pairs both of whose candidates gave a finite fitness."""
    alive = [value is not None and math.isfinite(value) for value in fitness]
    return [pair for pair in range(len(fitness) // 2) if alive[2 * pair] and alive[2 * pair + 1]]


def shape(fitness: Tensor, shaping: str) -> Tensor:
    """[n] fitness -> [n] utility. rank: centred ranks in [-0.5, 0.5], equal values share theirs. zscore: mean 0, standard
    deviation 1. none: as it is. Equal fitness everywhere gives equal utility, so pairs cancel exactly."""
    match shaping:
        case "none":
            return fitness
        case "zscore":
            return (fitness - fitness.mean()) / (fitness.std(correction=0) + 1e-8)
        case "rank":
            below = (fitness.unsqueeze(1) > fitness).sum(1)
            equal = (fitness.unsqueeze(1) == fitness).sum(1) - 1
            return (below + equal / 2) / (len(fitness) - 1) - 0.5
    raise ConfigError(f"shaping is '{shaping}'; it should be rank, zscore or none")


def noise(seed: int, size: int) -> Tensor:
    """[size] standard normal float64, the same for the same seed."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from a seed and what it is for."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _pair_noise(state: EvolutionState, config: MetaESConfig, pair: int, size: int) -> Tensor:
    return noise(derived_seed(config.seed, "pair", state.generation, pair), size)
