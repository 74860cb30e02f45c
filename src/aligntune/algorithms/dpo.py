"""Direct preference optimisation (arXiv 2305.18290) and its relatives: from token log-probabilities to the loss of a batch.

    L = sum over losses k of weight_k / M * sum_pairs w(pair) * loss_k(pair)  +  nll_weight / N * sum -log pi(y_w)

M pairs and N chosen tokens of the optimiser batch. The losses are in `pair_losses`; `loss_weights` mixes them (MPO,
2411.10442). `nll_weight` is `rpo_alpha` (RPO, 2404.19733) plus the weight of the loss called `sft`.

w is WPO's weight (2406.11827, Eq. 2) under `use_weighting`, else 1. It is not capped at 1 (the authors' code caps it, TRL no
longer does), and it does not touch the NLL term (in TRL it does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aligntune.algorithms.base import Needs, algorithm
from aligntune.algorithms.batch import Loss, Normalizers, PairBatch, PairLogProbs
from aligntune.algorithms.ops import divide, kl, masked, sequence_means
from aligntune.algorithms.pair_losses import PAIR_LOSSES, Pairs, score

if TYPE_CHECKING:
    from aligntune.config.algorithms import DPOConfig


def pair_weights(config: DPOConfig) -> dict[str, float]:
    """The losses in use, without `sft`, which is a loss of tokens."""
    return {name: weight for name, weight in config.losses.items() if name != "sft"}


def nll_weight(config: DPOConfig) -> float:
    return config.losses.get("sft", 0.0) + (config.rpo_alpha or 0.0)


def needs(config: DPOConfig) -> Needs:
    names = pair_weights(config)
    return Needs(
        reference=not config.reference_free,
        collision=config.use_weighting,
        whole_batch=any(PAIR_LOSSES[name].compares_pairs for name in names),
    )


# ---- from tokens to sequences ---------------------------------------------------------------------------------------


def sequence_log_prob(log_probs: Tensor, mask: Tensor, other_mask: Tensor, ld_alpha: float | None) -> Tensor:
    """[B] sum of token log-probabilities. With `ld_alpha` (LD-DPO, 2409.06411), tokens beyond the length of the pair's
    shorter answer count that much; positions are counted from the first completion token."""
    values = masked(log_probs, mask)
    if ld_alpha is None:
        return values.sum(1)
    shared = torch.minimum(mask.sum(1), other_mask.sum(1)).unsqueeze(1)
    return torch.where(mask.cumsum(1) <= shared, values, ld_alpha * values).sum(1)


def sequence_log_probs(batch: PairBatch, config: DPOConfig) -> PairLogProbs:
    """[B] sums of both answers under policy and reference, LD-DPO applied to both models alike.

    References given as [B] are taken as they are: they must have been summed by this function, under the same `ld_alpha`.
    `reference_free` reads none.
    """
    sides: list[Tensor] = []
    for log_probs, mask, other in (
        (batch.chosen_log_probs, batch.chosen_mask, batch.rejected_mask),
        (batch.rejected_log_probs, batch.rejected_mask, batch.chosen_mask),
        (batch.ref_chosen_log_probs, batch.chosen_mask, batch.rejected_mask),
        (batch.ref_rejected_log_probs, batch.rejected_mask, batch.chosen_mask),
    ):
        if log_probs is None or (config.reference_free and len(sides) >= 2):
            sides.append(torch.zeros_like(sides[0]))
        else:
            sides.append(
                log_probs if log_probs.dim() == 1 else sequence_log_prob(log_probs, mask, other, config.ld_alpha)
            )
    return PairLogProbs(*sides)


def wpo_weight(log_probs: Tensor, log_collision: Tensor | None, mask: Tensor) -> Tensor:
    """[B] exp(mean_t [log pi(y_t) - log sum_v pi(v)^2]), without gradient: 1 for a uniform policy."""
    if log_collision is None:
        raise ValueError("use_weighting: the batch needs the log collision probabilities")
    return sequence_means(log_probs.detach() - log_collision.detach(), mask).exp()


def _pairs(batch: PairBatch, config: DPOConfig) -> Pairs:
    sums = sequence_log_probs(batch, config)
    return Pairs(
        log_probs=sums,
        chosen_tokens=batch.chosen_mask.sum(1).clamp(min=1),
        rejected_tokens=batch.rejected_mask.sum(1).clamp(min=1),
        chosen_score=score(sums.chosen - sums.ref_chosen, config),
        rejected_score=score(sums.rejected - sums.ref_rejected, config),
        whole=batch.whole or sums.detach(),
        first=batch.first,
    )


# ---- the loss -------------------------------------------------------------------------------------------------------


@algorithm("dpo", inputs="pairs", needs=needs)
def loss(batch: PairBatch, config: DPOConfig, normalizers: Normalizers) -> Loss:
    if needs(config).reference and batch.ref_chosen_log_probs is None:
        raise ValueError("the batch needs the reference's log-probabilities (or set reference_free)")
    pairs = _pairs(batch, config)
    weight = torch.ones_like(pairs.chosen_ratio)
    if config.use_weighting:
        weight = wpo_weight(batch.chosen_log_probs, batch.chosen_log_collision, batch.chosen_mask)
        weight = weight * wpo_weight(batch.rejected_log_probs, batch.rejected_log_collision, batch.rejected_mask)
    value = batch.chosen_log_probs.new_zeros(())
    metrics = {}
    for name, coefficient in pair_weights(config).items():
        share = divide((weight * PAIR_LOSSES[name].function(pairs, config)).sum(), normalizers.num_sequences)
        value = value + coefficient * share
        metrics[f"loss/{name}"] = share.detach()
    if nll_weight(config):
        nll = divide(-masked(batch.chosen_log_probs, batch.chosen_mask).sum(), normalizers.num_tokens)
        value = value + nll_weight(config) * nll
        metrics["loss/nll"] = nll.detach()
    if config.use_weighting:
        metrics["wpo_weight"] = divide(weight.sum(), normalizers.num_sequences)
    return Loss(value, metrics | pair_metrics(batch, pairs, config, normalizers) | {"loss": value.detach()})


@torch.no_grad()
def pair_metrics(batch: PairBatch, pairs: Pairs, config: DPOConfig, normalizers: Normalizers) -> dict[str, Tensor]:
    """Means over pairs, as shares: implied rewards beta * log-ratio, their accuracy and margin, log-probabilities of both
    sides (chosen ones that fall are likelihood displacement, 2410.08847), and, where the reference's token log-probabilities
    are given, `kl/*`: the mean over a side's tokens of k3, a drift from the reference on texts that the policy did not write."""
    chosen, rejected = config.beta * pairs.chosen_ratio, config.beta * pairs.rejected_ratio
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": pairs.log_probs.chosen,
        "logps/rejected": pairs.log_probs.rejected,
    }
    for side in ("chosen", "rejected"):
        log_probs, mask = getattr(batch, f"{side}_log_probs"), getattr(batch, f"{side}_mask")
        reference = getattr(batch, f"ref_{side}_log_probs")
        if reference is not None and reference.dim() == 2:
            values[f"kl/{side}"] = sequence_means(kl("k3", masked(log_probs - reference, mask)), mask)
    return {name: divide(value.sum(), normalizers.num_sequences) for name, value in values.items()}
