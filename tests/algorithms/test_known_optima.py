"""Where do the losses end up? Problems whose best policy is known in closed form.

Preferences: two or three answers, a softmax policy over them, all pairs in proportion to their probability. Bandit: one token,
maximise E r - beta KL(pi || ref), solved by pi* = ref exp(r / beta) / Z. Samples are drawn evenly spaced, so no test depends
on luck.
"""

from __future__ import annotations

import math

import pytest
import torch

from aligntune import algorithms
from aligntune.algorithms import PairBatch, RolloutBatch, ScoredRollouts, dpo
from tiny import settings_of


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- preferences ----------------------------------------------------------------------------------------------------


def fit(pairs_of_answers, ref_logits, config) -> torch.Tensor:
    """Log-ratio of policy and reference, [answers], where the loss over these (chosen, rejected) pairs is least."""
    chosen, rejected = torch.tensor(pairs_of_answers).unbind(1)
    reference = ref_logits.log_softmax(0)
    logits = ref_logits.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    ones = torch.ones(len(chosen), 1)

    def closure():
        optimiser.zero_grad()
        policy = logits.log_softmax(0)
        columns = [x.unsqueeze(1) for x in (policy[chosen], policy[rejected])]
        references = [x.unsqueeze(1) for x in (reference[chosen], reference[rejected])]
        batch = PairBatch(*columns, ones, ones, *references)
        loss = dpo.loss(batch, config, batch.normalizers()).value
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().log_softmax(0) - reference


def logit(p: float) -> float:
    return math.log(p / (1 - p))


P, E, BETA = 0.7, 0.2, 0.5


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "expected"),
    [
        ("sigmoid", 0.0, logit(P) / BETA),
        ("sigmoid", E, logit(P * (1 - E) + (1 - P) * E) / BETA),  # cDPO smooths what it sees
        ("robust", E, logit((P - E) / (1 - 2 * E)) / BETA),  # takes 0.7 for 0.833 flipped with probability 0.2
        ("ipo", 0.0, (2 * P - 1) / (2 * BETA)),
        ("exo_pair", E, None),
    ],
)
def test_two_answers(loss_type, label_smoothing, expected):
    """7 pairs prefer answer 0 and 3 prefer answer 1."""
    if expected is None:  # EXO descends KL(p || q) averaged over labels: sigmoid(beta h) = softmax of the mean log q
        mean = 7 / 10 * math.log((1 - E) / E) - 3 / 10 * math.log((1 - E) / E)
        expected = mean / BETA
    config = settings_of("dpo", loss_type=loss_type, label_smoothing=label_smoothing, beta=BETA)
    ratio = fit([(0, 1)] * 7 + [(1, 0)] * 3, tensor([0.3, -0.4]), config)
    assert (ratio[0] - ratio[1]).item() == pytest.approx(expected, abs=1e-6)


def test_three_answers_find_the_policy_of_the_rewards():
    """Bradley-Terry preferences of rewards log 3, log 2, 0 (odds 3:2, 3:1, 2:1): beta * log-ratio = reward + constant."""
    pairs = [(0, 1)] * 36 + [(1, 0)] * 24 + [(0, 2)] * 45 + [(2, 0)] * 15 + [(1, 2)] * 40 + [(2, 1)] * 20
    ratio = fit(pairs, tensor([-1.0, 0.5, 0.2]), settings_of("dpo", beta=BETA))
    rewards = BETA * (ratio - ratio[2])
    assert rewards.tolist() == pytest.approx([math.log(3), math.log(2), 0], abs=1e-6)


def test_forward_kl_dpo_solves_its_own_problem():
    """f'(u) = 1 - 1/u: beta (1/u_1 - 1/u_0) = logit p at the optimum."""
    config = settings_of("dpo", beta=BETA, f_divergence_type="forward_kl")
    u = fit([(0, 1)] * 7 + [(1, 0)] * 3, tensor([0.3, -0.4]), config).exp()
    assert BETA * (1 / u[1] - 1 / u[0]).item() == pytest.approx(logit(P), abs=1e-6)


# ---- bandit ---------------------------------------------------------------------------------------------------------

SAMPLES = 800
REF = tensor([0.4, 0.3, 0.2, 0.1])
STRENGTH = 0.5


def evenly(probabilities) -> torch.Tensor:
    """[SAMPLES] actions in proportion to their probabilities."""
    points = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    return torch.bucketize(points, probabilities.cumsum(0)[:-1])


def train(name, config, rewards, *, steps=200, rate=1.0, updates=1) -> torch.Tensor:
    """The policy after `steps` rollouts of `updates` gradient steps each, with a step size that decays to 0."""
    spec = algorithms.get(name)
    logits = REF.log().clone().requires_grad_()
    mask = torch.ones(SAMPLES, 1)
    for step in range(steps):
        with torch.no_grad():
            actions = evenly(logits.softmax(0))
            old = logits.log_softmax(0)[actions].unsqueeze(1)
        ref = REF.log()[actions].unsqueeze(1)
        scores = rewards[actions].view(-1, 1 if name == "ppo" else SAMPLES)
        values = torch.zeros_like(old)
        rollouts = ScoredRollouts(scores, mask, torch.ones(SAMPLES), old, ref, values)
        made = spec.compute_advantages(rollouts, config)
        for _ in range(updates):
            batch = RolloutBatch(
                logits.log_softmax(0)[actions].unsqueeze(1), old, mask, made.advantages, ref,
                values=values, old_values=values, returns=values,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(spec.loss(batch, config, batch.normalizers(1)).value, logits)
            with torch.no_grad():
                logits -= rate * (1 - step / steps) * gradient
    return logits.detach().log_softmax(0)


def best_policy(rewards) -> torch.Tensor:
    return (REF.log() + rewards / STRENGTH).log_softmax(0)


def kl(log_p, log_q) -> float:
    return (log_p.exp() * (log_p - log_q)).sum().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo"])
def test_the_regularised_bandit(name, seed):
    """From the reference, KL(pi || pi*) falls to below 1e-5."""
    rewards = 2 * torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    config, rate = {
        "ppo": (settings_of("ppo", kl_coef=STRENGTH), 0.3),
        "grpo": (settings_of("grpo", kl_coef=STRENGTH, kl_estimator="k2", scale_rewards="none"), 4.0),
        "dr_grpo": (settings_of("dr_grpo", kl_coef=STRENGTH, kl_estimator="k2"), 4.0),
    }[name]
    start = kl(REF.log(), best_policy(rewards))
    found = kl(train(name, config, rewards, rate=rate), best_policy(rewards))
    assert start > 0.02
    assert found < 1e-5


def test_several_updates_per_rollout_reach_the_same_policy():
    rewards = tensor([0.1, 0.9, 0.3, 0.7])
    config = settings_of("ppo", kl_coef=STRENGTH)
    assert kl(train("ppo", config, rewards, steps=100, rate=0.3, updates=4), best_policy(rewards)) < 1e-5


def test_k3_as_a_loss_solves_the_other_problem():
    """The GRPO paper's k3 maximises E r - beta KL(ref || pi): pi(a) = beta ref(a) / (lambda - r(a))."""
    rewards = tensor([0.1, 0.9, 0.3, 0.7])
    low, high = rewards.max().item() + 1e-9, rewards.max().item() + 10
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (STRENGTH * REF / (middle - rewards)).sum() > 1 else (low, middle)
    expected = (STRENGTH * REF / (middle - rewards)).log()
    found = train("grpo", settings_of("grpo", kl_coef=STRENGTH, scale_rewards="none"), rewards, rate=2.0)
    assert kl(found, expected) < 1e-4
    assert kl(found, best_policy(rewards)) > 1e-3


def test_a_mirror_divergence_solves_its_own_problem():
    """D = (p - q)^2 of the sampled action: E_pi of its gradient is 2 sum_a pi(a)^2 (pi(a) - ref(a)) grad log pi(a), so that
    r(a) - 2 beta pi(a) (pi(a) - ref(a)) is the same for all actions at the end."""
    rewards = tensor([0.3, 0.7, 0.4, 0.6])
    config = settings_of("neural_mirror_grpo", mirror_map="prob_l2", mirror_coefficient=5.0, scale_rewards="none")
    pi = train("neural_mirror_grpo", config, rewards, rate=3.0).exp()
    level = rewards - 2 * 5.0 * pi * (pi - REF)
    assert pi.min() > 0.1
    assert (level - level.mean()).abs().max().item() < 1e-3
