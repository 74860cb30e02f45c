"""Neural Mirror GRPO (GBMPO, arXiv 2602.04380): GRPO with a Bregman divergence to the reference in place of KL.

    L = L_GRPO(kl_coef = 0) + mirror_coefficient * reduce(D_h(pi(o_t), ref(o_t)))

D_h comes from `mirror_map`: the neural map (random under `mirror_seed`, from the file `mirror_path`, or a candidate of Meta-ES),
generalised KL, or a squared distance. It is averaged as the other token losses are. `kl_coef`, when given, adds KL beside it
(the paper's l2kl variants).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from aligntune.algorithms import grpo
from aligntune.algorithms.base import Needs, algorithm
from aligntune.algorithms.batch import Loss, Normalizers, RolloutBatch
from aligntune.algorithms.mirror_map import SIMPLE_DIVERGENCES, Divergence, MirrorMap
from aligntune.algorithms.mirror_pictures import mirror_sections
from aligntune.algorithms.ops import masked, token_mean
from aligntune.algorithms.policy import clip_range, entropy_bonus, reduction, total
from aligntune.errors import ConfigError

if TYPE_CHECKING:
    from aligntune.config.algorithms import NeuralMirrorConfig


def needs(config: NeuralMirrorConfig) -> Needs:
    reference = config.mirror_coefficient > 0 or config.kl_coef > 0
    return Needs(reference=reference, rewards=True, entropy=entropy_bonus(config))


def divergence(config: NeuralMirrorConfig) -> Divergence:
    """The divergence that the config names. A map file is read once per process."""
    if config.mirror_map == "neural":
        return neural_map(config).divergence
    if config.mirror_map not in SIMPLE_DIVERGENCES:
        raise ConfigError(f"mirror_map is '{config.mirror_map}'; it should be neural, {', '.join(SIMPLE_DIVERGENCES)}")
    return SIMPLE_DIVERGENCES[config.mirror_map]


def neural_map(config: NeuralMirrorConfig) -> MirrorMap:
    """The neural map that the config names: of a file, or random."""
    return _map(config.mirror_path, config.mirror_seed)


def sections(config: NeuralMirrorConfig) -> list[dict[str, Any]]:
    """The map and its divergence for the report."""
    return mirror_sections(divergence(config), neural_map(config) if config.mirror_map == "neural" else None)


@lru_cache(maxsize=8)
def _map(path: str | None, seed: int) -> MirrorMap:
    return MirrorMap.random(seed) if path is None else MirrorMap.load(path)


def check(config: NeuralMirrorConfig) -> None:
    """ConfigError, before training, where the map cannot be read."""
    divergence(config)


def mirror_term(
    batch: RolloutBatch, config: NeuralMirrorConfig, normalizers: Normalizers, distance: Divergence | None = None
) -> Loss:
    """mirror_coefficient * reduce(D); `distance` in place of the config's, for maps that live in memory."""
    if config.mirror_coefficient == 0:
        return Loss(batch.log_probs.new_zeros(()))
    if batch.ref_log_probs is None:
        raise ValueError("the mirror divergence compares with a reference: the batch needs ref_log_probs")
    mask = batch.completion_mask
    distance = distance or divergence(config)
    values = distance(masked(batch.log_probs, mask), masked(batch.ref_log_probs, mask))
    value = config.mirror_coefficient * reduction(config, "sequence_mean")(values, mask, normalizers)
    mean = token_mean(values.detach(), mask, normalizers)
    return Loss(value, {"mirror_divergence": mean, "loss/mirror": value.detach()})


@algorithm(
    "neural_mirror_grpo",
    inputs="rollouts",
    needs=needs,
    advantages=grpo.advantages,
    group_relative=True,
    check=check,
    advice=grpo.advice,
    sections=sections,
)
def loss(
    batch: RolloutBatch, config: NeuralMirrorConfig, normalizers: Normalizers, *, distance: Divergence | None = None
) -> Loss:
    policy = grpo.policy_loss(batch, config, normalizers, average="sequence_mean", clip=clip_range(config))
    return total(policy, mirror_term(batch, config, normalizers, distance))
