"""What does one preference pair cost? Every loss of the DPO family, one function each.

In all of them, [B] each: `chosen_ratio` = log pi(y_w) - log ref(y_w), `rejected_ratio` the same of y_l, and `margin` h, the
difference of their scores, which are the log-ratios themselves unless an f-divergence replaces them (`score`). A loss is one
number per pair; the mean over the pairs of the optimiser batch is taken in `dpo`. Adding a loss is adding a function here, and
its name in `config.algorithms`: to `DPO_LOSSES`, and to the lists of those that take `label_smoothing` or an f-divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from aligntune.algorithms.batch import PairLogProbs

if TYPE_CHECKING:
    from aligntune.config.algorithms import DPOConfig

EXPONENT_LIMIT = 40.0
"""Exponents are clamped here: a *sequence* ratio easily leaves float32; exp(40) and its square (ipo) are inside. TRL clamps
at 80, and only in the alpha divergence."""


@dataclass(frozen=True)
class Pairs:
    """[B] quantities of a micro-batch; `whole` and `first` as in `PairBatch`."""

    log_probs: PairLogProbs
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    whole: PairLogProbs
    first: int

    @property
    def chosen_ratio(self) -> Tensor:
        return self.log_probs.chosen - self.log_probs.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.log_probs.rejected - self.log_probs.ref_rejected

    @property
    def margin(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def mean_margin(self) -> Tensor:
        """The margin of scores per token."""
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens


@dataclass(frozen=True)
class PairLoss:
    """A loss and what it needs."""

    function: Callable[[Pairs, DPOConfig], Tensor]
    compares_pairs: bool
    """Needs `whole`: the loss of a pair depends on the other pairs of the batch."""


PAIR_LOSSES: dict[str, PairLoss] = {}

_Function = Callable[[Pairs, "DPOConfig"], Tensor]


def pair_loss(name: str, *, compares_pairs: bool = False) -> Callable[[_Function], _Function]:
    """Decorator: makes a function known as `loss_type: name`."""

    def decorate(function: _Function) -> _Function:
        PAIR_LOSSES[name] = PairLoss(function, compares_pairs)
        return function

    return decorate


# ---- scores ---------------------------------------------------------------------------------------------------------


def score(log_ratio: Tensor, config: DPOConfig) -> Tensor:
    """f'(u) at u = pi / ref, up to a constant that cancels in the margin (f-DPO, 2309.16240), any shape.

    reverse_kl: log u. forward_kl: 1 - 1/u. js_divergence: log(2u / (1 + u)). alpha_divergence: (1 - u^-a) / a with the
    *paper's* alpha, so that a = 1 is forward KL and a -> 0 reverse KL. TRL >= 0.29 calls 1 - a its coefficient.
    """
    match config.f_divergence_type:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            alpha = 1.0
        case "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        case "alpha_divergence":
            alpha = config.f_alpha_divergence_coef
    if alpha == 0:
        return log_ratio
    return -torch.expm1((-alpha * log_ratio).clamp(max=EXPONENT_LIMIT)) / alpha


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)."""
    loss = -F.logsigmoid(margin)
    return loss if label_smoothing == 0 else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)


# ---- losses of the margin -------------------------------------------------------------------------------------------


@pair_loss("sigmoid")
def sigmoid(pairs: Pairs, config: DPOConfig) -> Tensor:
    """-log sigmoid(beta h) (2305.18290, Eq. 7). With label smoothing e it is cDPO (Mitchell's note, Eq. 3), whose optimum is
    at sigmoid(beta h) = 1 - e. TRL ignores label smoothing here since 0.29."""
    return logistic(config.beta * pairs.margin, config.label_smoothing)


@pair_loss("sigmoid_norm")
def sigmoid_norm(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Sigmoid loss of scores per token (Tulu 3, 2411.15124). Label smoothing acts as in `sigmoid`; in TRL it does not."""
    return logistic(config.beta * pairs.mean_margin, config.label_smoothing)


@pair_loss("robust")
def robust(pairs: Pairs, config: DPOConfig) -> Tensor:
    """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e) (2403.00409): over labels flipped with probability e
    its expectation is the clean sigmoid loss."""
    e, margin = config.label_smoothing, config.beta * pairs.margin
    return (e * F.logsigmoid(-margin) - (1 - e) * F.logsigmoid(margin)) / (1 - 2 * e)


@pair_loss("hinge")
def hinge(pairs: Pairs, config: DPOConfig) -> Tensor:
    """max(0, 1 - beta h) (SLiC 2305.10425, RSO 2309.06657)."""
    return torch.relu(1 - config.beta * pairs.margin)


@pair_loss("ipo")
def ipo(pairs: Pairs, config: DPOConfig) -> Tensor:
    """(h - 1 / (2 beta))^2 with scores per token (2310.12036, Eq. 17). The paper writes sums; dividing by the lengths follows
    TRL, where the authors confirmed it as what their results used."""
    return (pairs.mean_margin - 1 / (2 * config.beta)).square()


@pair_loss("exo_pair")
def exo_pair(pairs: Pairs, config: DPOConfig) -> Tensor:
    """KL(p || q) of p = (sigmoid(beta h), sigmoid(-beta h)) and q = (1 - e, e) (2402.00856, Eq. 16). Needs e > 0."""
    e, margin = config.label_smoothing, config.beta * pairs.margin
    wins, loses = F.logsigmoid(margin), F.logsigmoid(-margin)
    return wins.exp() * (wins - math.log1p(-e)) + loses.exp() * (loses - math.log(e))


@pair_loss("discopop")
def discopop(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Log-ratio modulated loss (2406.08414, Eq. 5), not convex: with x = beta h and g = sigmoid(x / tau),
    (1 - g) (-log sigmoid(x)) + g exp(-x)."""
    x = config.beta * pairs.margin
    gate = torch.sigmoid(x / config.discopop_tau)
    return (1 - gate) * -F.logsigmoid(x) + gate * torch.exp((-x).clamp(max=EXPONENT_LIMIT))


# ---- losses of each side --------------------------------------------------------------------------------------------


@pair_loss("nca_pair")
def nca_pair(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Noise contrastive alignment (2402.05369): -log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2, with r = beta * log-ratio."""
    chosen, rejected = config.beta * pairs.chosen_ratio, config.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@pair_loss("bco_pair")
def bco_pair(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Binary classifier (2404.04656): -log s(r_w) - log s(-r_l), without the paper's running reward shift (as in TRL)."""
    return -F.logsigmoid(config.beta * pairs.chosen_ratio) - F.logsigmoid(-config.beta * pairs.rejected_ratio)


@pair_loss("sppo_hard")
def sppo_hard(pairs: Pairs, config: DPOConfig) -> Tensor:
    """(l_w - 1/(2 beta))^2 + (l_l + 1/(2 beta))^2 (SPPO, 2405.00675, Eq. 4.7, with win probabilities 1 and 0)."""
    target = 0.5 / config.beta
    return (pairs.chosen_ratio - target).square() + (pairs.rejected_ratio + target).square()


@pair_loss("apo_zero")
def apo_zero(pairs: Pairs, config: DPOConfig) -> Tensor:
    """1 - s(r_w) + s(r_l) (2408.06266, Eq. 7): for chosen answers better than the model's own."""
    return torch.sigmoid(-config.beta * pairs.chosen_ratio) + torch.sigmoid(config.beta * pairs.rejected_ratio)


@pair_loss("apo_down")
def apo_down(pairs: Pairs, config: DPOConfig) -> Tensor:
    """s(r_w) + 1 - s(r_w - r_l) (2408.06266, Eq. 8): for chosen answers worse than the model's own."""
    difference = pairs.chosen_ratio - pairs.rejected_ratio
    return torch.sigmoid(config.beta * pairs.chosen_ratio) + torch.sigmoid(-config.beta * difference)


# ---- losses that compare the pairs of a batch -----------------------------------------------------------------------


@pair_loss("kto", compares_pairs=True)
def kto(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Mean of 1 - s(beta (l_w - z_l)) and 1 - s(beta (z_w - l_l)), the pairwise KTO loss of TRL <= 0.8 (HALOs, Eq. 7), where
    z_w and z_l, the KL estimates, are max(0, mean log-ratio) of the batch's chosen and rejected answers, without gradient."""
    whole = pairs.whole
    kl_chosen = (whole.chosen - whole.ref_chosen).mean().clamp(min=0)
    kl_rejected = (whole.rejected - whole.ref_rejected).mean().clamp(min=0)
    chosen = torch.sigmoid(-config.beta * (pairs.chosen_ratio - kl_rejected))
    rejected = torch.sigmoid(-config.beta * (kl_chosen - pairs.rejected_ratio))
    return (chosen + rejected) / 2


@pair_loss("aot", compares_pairs=True)
def aot(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Alignment via optimal transport (2406.05882, paired): sigmoid loss of the sorted policy margins minus the sorted
    reference margins of the batch."""
    own, whole = pairs.log_probs, pairs.whole
    margin = own.chosen - own.rejected
    partner = _partner(pairs, whole.chosen - whole.rejected, whole.ref_chosen - whole.ref_rejected)
    return logistic(config.beta * (margin - partner), config.label_smoothing)


@pair_loss("aot_unpaired", compares_pairs=True)
def aot_unpaired(pairs: Pairs, config: DPOConfig) -> Tensor:
    """Alignment via optimal transport (2406.05882, unpaired): sigmoid loss of the sorted chosen log-ratios minus the sorted
    rejected ones.

    A matched couple may lie in two micro-batches. Each answer carries its own gradient against its partner held fixed, and
    the value counts a couple once, with its chosen answer."""
    chosen = pairs.whole.chosen - pairs.whole.ref_chosen
    rejected = pairs.whole.rejected - pairs.whole.ref_rejected
    of_chosen = config.beta * (pairs.chosen_ratio - _partner(pairs, chosen, rejected))
    of_rejected = config.beta * (_partner(pairs, rejected, chosen) - pairs.rejected_ratio)
    gradient_only = logistic(of_rejected, config.label_smoothing)
    return logistic(of_chosen, config.label_smoothing) + gradient_only - gradient_only.detach()


def _partner(pairs: Pairs, mine: Tensor, theirs: Tensor) -> Tensor:
    """[B]: for each of this micro-batch's entries of `mine` [M], the entry of `theirs` [M] that has the same rank."""
    ranks = mine.argsort(stable=True).argsort()
    return theirs.sort().values[ranks][pairs.first : pairs.first + len(pairs.chosen_ratio)]
