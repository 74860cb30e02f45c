"""The DPO family: golden numbers, fixed points, gradients and invariances.

The common example: one pair, log pi = -10 and -12, log ref = -11 for both, so the log-ratios are 1 and -1 and h = 2; beta 0.1.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from aligntune import algorithms
from aligntune.algorithms import Normalizers, PairBatch, PairLogProbs, combine_metrics, dpo
from aligntune.algorithms.pair_losses import PAIR_LOSSES
from aligntune.config.algorithms import DPO_LOSSES, MARGIN_LOSSES, SMOOTHED_LOSSES
from tiny import settings_of

LN2 = math.log(2)
COMPARING = ["kto", "aot", "aot_unpaired"]
ALL = [*PAIR_LOSSES, "sft"]


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pair(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens=1, rejected_tokens=1, **fields_) -> PairBatch:
    """Pairs by their sequence log-probabilities, spread evenly over the tokens."""

    def spread(total, tokens):
        return (tensor(total).reshape(-1, 1) / tokens).repeat(1, tokens)

    count = len(tensor(chosen).reshape(-1))
    return PairBatch(
        chosen_log_probs=spread(chosen, chosen_tokens).requires_grad_(),
        rejected_log_probs=spread(rejected, rejected_tokens).requires_grad_(),
        chosen_mask=torch.ones(count, chosen_tokens),
        rejected_mask=torch.ones(count, rejected_tokens),
        ref_chosen_log_probs=spread(ref_chosen, chosen_tokens),
        ref_rejected_log_probs=spread(ref_rejected, rejected_tokens),
        **fields_,
    )


def example(**tokens) -> PairBatch:
    return pair(-10.0, -12.0, -11.0, -11.0, **tokens)


def config_of(name, **settings):
    if name in ("exo_pair",):
        settings.setdefault("label_smoothing", 0.1)
    return settings_of("dpo", loss_type=name, **settings)


def value(batch, config, normalizers=None):
    return dpo.loss(batch, config, normalizers or batch.normalizers())


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- golden numbers -------------------------------------------------------------------------------------------------

EXO = sigmoid(0.2) * (log_sigmoid(0.2) - math.log(0.9)) + sigmoid(-0.2) * (log_sigmoid(-0.2) - math.log(0.1))
NCA = -log_sigmoid(0.1) - 0.5 * log_sigmoid(-0.1) - 0.5 * log_sigmoid(0.1)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {}, 0.598139),
        ("sigmoid", {"label_smoothing": 0.1}, 0.618139),
        ("robust", {"label_smoothing": 0.1}, 0.573139),
        ("hinge", {}, 0.8),
        ("ipo", {}, 9.0),  # (2 - 5)^2
        ("kto", {}, (0.475021 + 0.450166) / 2),
        ("discopop", {}, 0.814763),
        ("exo_pair", {"label_smoothing": 0.1}, EXO),
        ("nca_pair", {}, NCA),
        ("bco_pair", {}, -2 * log_sigmoid(0.1)),
        ("sppo_hard", {}, 2 * 4.0**2),  # (1 - 5)^2 + (-1 + 5)^2
        ("apo_zero", {}, 2 * sigmoid(-0.1)),
        ("apo_down", {}, sigmoid(0.1) + sigmoid(-0.2)),
        ("aot", {}, 0.598139),  # of one pair, the sigmoid loss
        ("aot_unpaired", {}, 0.598139),
        ("sigmoid_norm", {}, 0.598139),
        ("sft", {}, 10.0),
        ("sigmoid", {"reference_free": True}, 0.598139),  # -10 - (-12) = 2 as well
        ("sigmoid", {"f_divergence_type": "js_divergence"}, 0.644397),
        ("sigmoid", {"f_divergence_type": "forward_kl"}, 0.582517),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, 0.582517),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, 0.594349),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0}, 0.598139),
    ],
)
def test_golden(name, settings, expected):
    config = settings_of("dpo", loss_type=name, **settings)
    assert value(example(), config).value.item() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("sigmoid", {}, -log_sigmoid(0.75)),
        ("robust", {"label_smoothing": 0.1}, (0.1 * log_sigmoid(-0.75) - 0.9 * log_sigmoid(0.75)) / 0.8),
        ("hinge", {}, 0.25),
        ("ipo", {}, 1.0),  # (3 - 2)^2
        ("kto", {}, (sigmoid(-0.5) + sigmoid(-0.75)) / 2),  # z_w = 2, z_l = 0
        ("discopop", {"discopop_tau": 0.5}, sigmoid(-1.5) * -log_sigmoid(0.75) + sigmoid(1.5) * math.exp(-0.75)),
        ("nca_pair", {}, -log_sigmoid(0.5) - 0.5 * (log_sigmoid(-0.5) + log_sigmoid(0.25))),
        ("bco_pair", {}, -log_sigmoid(0.5) - log_sigmoid(0.25)),
        ("sppo_hard", {}, 1.0),  # (2 - 2)^2 + (-1 + 2)^2
        ("apo_zero", {}, sigmoid(-0.5) + sigmoid(-0.25)),
        ("apo_down", {}, sigmoid(0.5) + sigmoid(-0.75)),
        *((name, {"label_smoothing": 0.2}, -0.8 * log_sigmoid(0.75) - 0.2 * log_sigmoid(-0.75))
          for name in ("sigmoid", "sigmoid_norm", "aot", "aot_unpaired")),
    ],
)  # fmt: skip
def test_log_ratios_that_are_no_mirror_images(name, settings, expected):
    """Log-ratios 2 and -1, so h = 3, at beta 1/4: neither side can stand for the other."""
    config = settings_of("dpo", loss_type=name, beta=0.25, **settings)
    assert value(pair(-9.0, -12.0, -11.0, -11.0), config).value.item() == pytest.approx(expected)


def test_alpha_divergence_follows_the_paper():
    """(1 - u^-a) / a at a = 0.3, where TRL's (u^(a-1) - 1) / (a - 1) is another number."""
    config = settings_of("dpo", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3)
    margin = (math.exp(0.3) - math.exp(-0.3)) / 0.3
    assert value(example(), config).value.item() == pytest.approx(-log_sigmoid(0.1 * margin))


def test_every_configured_name_exists():
    assert sorted(ALL) == sorted(DPO_LOSSES)
    assert {*SMOOTHED_LOSSES, *MARGIN_LOSSES} < set(PAIR_LOSSES)


@pytest.mark.parametrize(
    ("name", "expected"), [("ipo", 20.7025), ("sigmoid_norm", -log_sigmoid(0.1 * (1 / 4 + 1 / 5)))]
)
def test_length_normalised_losses(name, expected):
    """Lengths 4 and 5: h = 1/4 + 1/5 = 0.45; ipo (0.45 - 5)^2."""
    batch = example(chosen_tokens=4, rejected_tokens=5)
    assert value(batch, config_of(name)).value.item() == pytest.approx(expected)


def test_kto_of_two_pairs():
    """Log-ratios (3, -1) and (1, 1): z_w = 2, z_l = 0. Terms 1 - s(.3), 1 - s(.2 + .1) and 1 - s(.1), 1 - s(.2 - .1)."""
    batch = pair([3.0, 1.0], [-1.0, 1.0], [0.0, 0.0], [0.0, 0.0])
    expected = (2 * sigmoid(-0.3) + 2 * sigmoid(-0.1)) / 4
    assert value(batch, config_of("kto")).value.item() == pytest.approx(expected)


def test_the_kl_estimates_of_kto_are_not_negative():
    """Log-ratios -3 and -1: z_w = z_l = 0. Terms 1 - s(-.3) and 1 - s(.1)."""
    expected = (sigmoid(0.3) + sigmoid(-0.1)) / 2
    assert value(pair(-3.0, -1.0, 0.0, 0.0), config_of("kto")).value.item() == pytest.approx(expected)


def test_aot_sorts_over_the_batch():
    """Policy margins 2 and 0, reference margins 0 and 1, sorted: (0, 0) and (2, 1): beta times 0 and 1."""
    batch = pair([2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0])
    assert value(batch, config_of("aot")).value.item() == pytest.approx((LN2 - log_sigmoid(0.1)) / 2)
    # log-ratios of chosen 2 and -1, of rejected 0 and 0
    assert value(batch, config_of("aot_unpaired")).value.item() == pytest.approx(
        (-log_sigmoid(0.2) - log_sigmoid(-0.1)) / 2
    )


def test_aot_matches_by_rank():
    """Policy margins (3, 1, 2), reference margins (0, 4, 2), sorted (1, 2, 3) and (0, 2, 4): differences 1, 0, -1."""
    batch = pair([3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 4.0, 2.0], [0.0, 0.0, 0.0])
    expected = -(log_sigmoid(0.1) + log_sigmoid(0.0) + log_sigmoid(-0.1)) / 3
    assert value(batch, config_of("aot")).value.item() == pytest.approx(expected)


def test_rpo_adds_the_token_mean_of_the_chosen_answers():
    batch = example(chosen_tokens=4)
    result = value(batch, settings_of("dpo", rpo_alpha=1.0))
    assert result.value.item() == pytest.approx(3.098139, abs=6e-7)
    assert result.metrics["loss/nll"].item() == pytest.approx(2.5)


def test_the_nll_is_a_mean_of_tokens_not_of_sequences():
    """Chosen answers of 1 and 3 tokens with log-probabilities -4 | -1 -1 -1: 7 / 4."""
    chosen = tensor([[-4.0, math.nan, math.nan], [-1.0, -1.0, -1.0]])
    mask = tensor([[1, 0, 0], [1, 1, 1]])
    batch = PairBatch(chosen, chosen, mask, mask)
    assert value(batch, settings_of("dpo", loss_type="sft", reference_free=True)).value.item() == pytest.approx(7 / 4)


def test_mixed_losses_are_their_weighted_sum():
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    result = value(example(chosen_tokens=4), settings_of("dpo", loss_weights=weights))
    assert result.value.item() == pytest.approx(0.8 * 0.5981388693815918 + 0.2 * -2 * log_sigmoid(0.1) + 2.5)
    assert result.metrics["loss/bco_pair"].item() == pytest.approx(-2 * log_sigmoid(0.1))


@pytest.mark.parametrize(("alpha", "chosen"), [(0.0, -3.0), (0.5, -6.5), (1.0, -10.0)])
def test_ld_dpo(alpha, chosen):
    """Chosen -1 -2 -3 -4, rejected -1 -1: the first two tokens count in full. Padding in front does not shift the count."""
    log_probs = tensor([[math.nan, -1.0, -2.0, -3.0, -4.0]])
    mask, other = tensor([[0, 1, 1, 1, 1]]).bool(), tensor([[1, 1]]).bool()
    assert dpo.sequence_log_prob(log_probs, mask, other, alpha).item() == chosen
    assert dpo.sequence_log_prob(tensor([[-1.0, -1.0]]), other, mask, alpha).item() == -2


def test_ld_dpo_treats_policy_and_reference_alike(pairs):
    batch = pairs()
    batch.ref_chosen_log_probs = batch.chosen_log_probs.detach()
    batch.ref_rejected_log_probs = batch.rejected_log_probs.detach()
    assert value(batch, settings_of("dpo", ld_alpha=0.3)).value.item() == pytest.approx(LN2)


def test_wpo_weights():
    """p = (.5, .25, .25): p / sum p^2 is 4/3, 2/3, 2/3. A uniform policy weighs 1."""
    p = tensor([0.5, 0.25, 0.25])
    collision = p.square().sum().log()
    for token, weight in zip(p, (4 / 3, 2 / 3, 2 / 3)):
        got = dpo.wpo_weight(token.log().reshape(1, 1), collision.reshape(1, 1), torch.ones(1, 1).bool())
        assert got.item() == pytest.approx(weight)
    uniform = torch.full((1, 7), -math.log(5), dtype=torch.float64)
    assert dpo.wpo_weight(uniform, uniform, torch.ones(1, 7).bool()).item() == pytest.approx(1)


def test_wpo_weighs_each_pair_and_has_no_gradient():
    batch = pair(-10.0, -12.0, -11.0, -11.0)
    batch.chosen_log_collision = batch.chosen_log_probs.detach() - math.log(0.5)
    batch.rejected_log_collision = batch.rejected_log_probs.detach() - math.log(0.25)
    result = value(batch, settings_of("dpo", use_weighting=True))
    assert result.value.item() == pytest.approx(0.5 * 0.25 * 0.598139, abs=1e-6)
    assert result.metrics["wpo_weight"].item() == pytest.approx(0.125)
    result.value.backward()
    assert batch.chosen_log_probs.grad.item() == pytest.approx(-0.125 * 0.1 * sigmoid(-0.2))


def test_metrics():
    metrics = {
        name: metric.item() for name, metric in value(example(chosen_tokens=2), settings_of("dpo")).metrics.items()
    }
    assert metrics["rewards/chosen"] == pytest.approx(0.1)
    assert metrics["rewards/rejected"] == pytest.approx(-0.1)
    assert metrics["rewards/margins"] == pytest.approx(0.2)
    assert metrics["rewards/accuracies"] == 1
    assert metrics["logps/chosen"] == pytest.approx(-10)
    assert metrics["logps/rejected"] == pytest.approx(-12)
    assert metrics["kl/chosen"] == pytest.approx(math.exp(-0.5) - 0.5)  # two tokens with d = 1/2
    assert metrics["kl/rejected"] == pytest.approx(math.e - 2)  # one token with d = -1
    assert (
        value(pair(-3.0, -4.0, -3.0, -4.0), settings_of("dpo")).metrics["rewards/accuracies"] == 0
    )  # a tie is not right


def test_references_summed_before_give_the_same_loss():
    per_token = example(chosen_tokens=4)
    summed = replace(per_token, ref_chosen_log_probs=tensor([-11.0]), ref_rejected_log_probs=tensor([-11.0]))
    result = value(summed, settings_of("dpo"))
    assert result.value.item() == pytest.approx(value(per_token, settings_of("dpo")).value.item())
    assert "kl/chosen" not in result.metrics


def test_reference_free_ignores_a_reference():
    batch = pair(-10.0, -12.0, -11.0, -14.0)
    assert value(batch, settings_of("dpo", reference_free=True)).value.item() == pytest.approx(0.598139, abs=1e-6)
    assert value(batch, settings_of("dpo")).value.item() == pytest.approx(-log_sigmoid(0.1 * (1 - 2)))


# ---- fixed points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", LN2), ("robust", LN2), ("aot", LN2), ("aot_unpaired", LN2), ("sigmoid_norm", LN2),
        ("hinge", 1), ("ipo", 25), ("kto", 0.5), ("discopop", (LN2 + 1) / 2), ("nca_pair", 2 * LN2), ("bco_pair", 2 * LN2),
        ("sppo_hard", 50), ("apo_zero", 1), ("apo_down", 1),
        ("exo_pair", 0.5 * (math.log(0.5 / 0.9) + math.log(0.5 / 0.1))),
    ],
)  # fmt: skip
def test_loss_where_policy_and_reference_agree(name, expected, pairs):
    batch = pairs()
    batch.ref_chosen_log_probs = batch.chosen_log_probs.detach()
    batch.ref_rejected_log_probs = batch.rejected_log_probs.detach()
    settings = {"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}
    assert value(batch, settings_of("dpo", loss_type=name, **settings)).value.item() == pytest.approx(expected)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_every_divergence_starts_at_ln_2(divergence):
    config = settings_of("dpo", f_divergence_type=divergence)
    assert value(pair(-3.0, -4.0, -3.0, -4.0), config).value.item() == pytest.approx(LN2)


def slope(h, config):
    """d loss / d h at log-ratios h and 0."""
    batch = pair(h, 0.0, 0.0, 0.0)
    result = value(batch, config)
    return torch.autograd.grad(result.value, batch.chosen_log_probs)[0].item()


def test_slopes_and_zeros():
    assert slope(2.0, settings_of("dpo")) == pytest.approx(-0.1 * sigmoid(-0.2))
    assert slope(10 * math.log(9), settings_of("dpo", label_smoothing=0.1)) == pytest.approx(
        0, abs=1e-15
    )  # h* = ln(.9/.1)/beta
    assert slope(5.0, config_of("ipo")) == 0  # h* = 1/(2 beta)
    assert slope(10.5, config_of("hinge")) == 0  # beyond 1/beta
    assert slope(9.5, config_of("hinge")) == pytest.approx(-0.1)
    js = settings_of("dpo", f_divergence_type="js_divergence")
    assert abs(slope(2.0, js)) < abs(slope(2.0, settings_of("dpo")))


def test_robust_is_the_clean_loss_in_expectation_over_flipped_labels():
    config = config_of("robust", label_smoothing=0.2)
    right, flipped = value(pair(1.0, -1.0, 0.0, 0.0), config), value(pair(-1.0, 1.0, 0.0, 0.0), config)
    clean = value(pair(1.0, -1.0, 0.0, 0.0), settings_of("dpo"))
    assert 0.8 * right.value.item() + 0.2 * flipped.value.item() == pytest.approx(clean.value.item())


def test_alpha_divergence_joins_forward_and_reverse_kl():
    def loss(**settings):
        return value(example(), settings_of("dpo", **settings)).value.item()

    tiny = loss(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1e-9)
    assert tiny == pytest.approx(loss(f_divergence_type="reverse_kl"), abs=1e-8)


@pytest.mark.parametrize(
    ("name", "divergence"),
    [*((name, "reverse_kl") for name in ALL), *((name, "forward_kl") for name in MARGIN_LOSSES)],
)
def test_extreme_log_ratios_stay_finite(name, divergence):
    """Sequence log-ratios of +-1000 in float32."""
    config = config_of(name, f_divergence_type=divergence)
    batch = pair([-1000.0, 0.0], [0.0, -1000.0], [0.0, -1000.0], [-1000.0, 0.0])
    for f in fields(batch):
        x = getattr(batch, f.name)
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
            setattr(batch, f.name, x.detach().float().requires_grad_())
    result = value(batch, config)
    result.value.backward()
    assert math.isfinite(result.value.item())
    assert batch.chosen_log_probs.grad.isfinite().all()


# ---- gradients and invariances --------------------------------------------------------------------------------------


def every_config():
    yield from ((name, config_of(name)) for name in ALL)
    yield "cdpo", settings_of("dpo", label_smoothing=0.2)
    yield "js", settings_of("dpo", f_divergence_type="js_divergence")
    yield "ld", settings_of("dpo", ld_alpha=0.5)
    yield "rpo", settings_of("dpo", rpo_alpha=0.7)
    yield "wpo", settings_of("dpo", use_weighting=True)
    yield "mpo", settings_of("dpo", loss_weights={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0})


CONFIGS = dict(every_config())


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {*COMPARING, "wpo"}))
def test_gradients_against_finite_differences(name, pairs):
    """(kto, aot and wpo hold part of their value fixed on purpose; the cuts below and the golden slopes cover them.)"""
    batch = pairs(rows=3, tokens=3, seed=2)

    def loss(chosen, rejected):
        return value(replace(batch, chosen_log_probs=chosen, rejected_log_probs=rejected), CONFIGS[name]).value

    assert torch.autograd.gradcheck(loss, (batch.chosen_log_probs, batch.rejected_log_probs), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_transport_gradients_against_finite_differences(name, pairs):
    """With matches and partners moving along: the value of a whole batch, away from ties."""
    batch = pairs(rows=4, tokens=2, seed=3)
    config = CONFIGS[name]

    def loss(chosen, rejected):
        return value(replace(batch, chosen_log_probs=chosen, rejected_log_probs=rejected), config).value

    assert torch.autograd.gradcheck(loss, (batch.chosen_log_probs, batch.rejected_log_probs), eps=1e-6, atol=1e-7)


def rows(batch: PairBatch, part: slice, whole: PairLogProbs) -> PairBatch:
    parts = {f.name: getattr(batch, f.name)[part] for f in fields(batch) if f.name not in ("whole", "first")}
    return PairBatch(**parts, whole=whole, first=part.start)


@pytest.mark.parametrize("name", CONFIGS)
@examples(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), max_size=4, unique=True), seed=st.integers(0, 1000))
def test_cutting_the_batch_changes_nothing(name, pairs, cuts, seed):
    batch, config = pairs(seed=seed), CONFIGS[name]
    whole = value(batch, config)
    bounds = [0, *sorted(cuts), 6]
    sums = dpo.sequence_log_probs(batch, config).detach()
    parts = [rows(batch, slice(a, b), sums) for a, b in pairwise(bounds)]
    normalizers = parts[0].normalizers()
    for part in parts[1:]:
        normalizers = normalizers + part.normalizers()
    shares = [value(part, config, normalizers) for part in parts]
    total = sum(share.value for share in shares)
    assert total.item() == pytest.approx(whole.value.item(), abs=1e-12)
    combined = combine_metrics(share.metrics for share in shares)
    for metric, expected in whole.metrics.items():
        assert combined[metric].item() == pytest.approx(expected.item(), abs=1e-12), metric
    leaves = (batch.chosen_log_probs, batch.rejected_log_probs)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in
                              (total, whole.value))):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_the_whole_is_the_micro_batches_in_order(pairs):
    batch, config = pairs(), settings_of("dpo")
    sums = dpo.sequence_log_probs(batch, config).detach()
    parts = [dpo.sequence_log_probs(rows(batch, part, sums), config).detach() for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(PairLogProbs.cat(parts).rejected, sums.rejected)


@pytest.mark.parametrize("name", CONFIGS)
def test_growing_the_padding_changes_nothing(name, pairs):
    batch = pairs()
    grown = {}
    for f in fields(batch):
        x = getattr(batch, f.name)
        if isinstance(x, torch.Tensor):
            grown[f.name] = torch.nn.functional.pad(
                x.detach(), (0, 3), value=False if x.dtype == torch.bool else math.nan
            )
    for side in ("chosen", "rejected"):
        grown[f"{side}_log_probs"].requires_grad_()
    larger = PairBatch(**grown)
    result, other = value(batch, CONFIGS[name]), value(larger, CONFIGS[name])
    assert other.value.item() == pytest.approx(result.value.item(), abs=1e-12)
    assert all(
        other.metrics[metric].item() == pytest.approx(x.item(), abs=1e-12) for metric, x in result.metrics.items()
    )
    ours, theirs = (torch.autograd.grad(x.value, b.chosen_log_probs)[0] for x, b in ((other, larger), (result, batch)))
    torch.testing.assert_close(ours[:, :5], theirs)
    assert (ours[:, 5:] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_empty_answers_give_no_nan(name, pairs):
    batch = pairs()
    batch.chosen_mask = torch.zeros_like(batch.chosen_mask)
    batch.rejected_mask = torch.zeros_like(batch.rejected_mask)
    result = value(batch, CONFIGS[name])
    result.value.backward()
    assert math.isfinite(result.value.item())
    assert (batch.chosen_log_probs.grad == 0).all()


# ---- what it needs ---------------------------------------------------------------------------------------------------


def test_what_dpo_needs():
    def needs(**settings):
        return algorithms.get("dpo").needs(settings_of("dpo", **settings))

    assert needs().reference
    assert not needs().whole_batch
    assert not needs().collision
    assert not needs(reference_free=True).reference
    assert needs(use_weighting=True).collision
    assert all(needs(loss_type=name).whole_batch for name in COMPARING)


def test_missing_parts_are_errors(pairs):
    with pytest.raises(ValueError, match="reference"):
        value(replace(pairs(), ref_chosen_log_probs=None, ref_rejected_log_probs=None), settings_of("dpo"))
    with pytest.raises(ValueError, match="collision"):
        value(replace(pairs(), chosen_log_collision=None), settings_of("dpo", use_weighting=True))
    with pytest.raises(ValueError, match="chosen_mask"):
        replace(pairs(), chosen_mask=torch.ones(6, 4))


def test_normalizers_count_pairs_and_chosen_tokens(pairs):
    batch = pairs()
    both = batch.normalizers() + batch.normalizers()
    assert both == Normalizers(12, 2 * batch.chosen_mask.sum())
