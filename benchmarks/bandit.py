"""Where do the online algorithms end up? A bandit whose best policy is known in closed form.

One token is chosen among ten; its reward is drawn once per seed, and the policy is trained to maximise E r - beta KL(pi || ref).
The solution is pi* = ref exp(r / beta) / Z. GRPO's own k3, used as a loss, descends the other KL: E r - beta KL(ref || pi) has the
solution pi(a) = beta ref(a) / (lambda - r(a)). Printed is how far the trained policy is from either.

Rewards, advantages and losses are the library's; actions are drawn in exact proportion to their probabilities, so that nothing
depends on luck but the rewards.

    OMP_NUM_THREADS=1 python benchmarks/bandit.py [--seeds 5] [--out benchmarks/results/bandit.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligntune import algorithms
from aligntune.algorithms import RolloutBatch, ScoredRollouts
from aligntune.config.resolve import resolve

ACTIONS, SAMPLES, BETA = 10, 1000, 0.5
UNDIVIDED = {"kl_coef": BETA, "scale_rewards": "none"}
"""Dividing rewards by their deviation is another problem: that of beta times the deviation."""
RUNS: list[tuple[str, str, dict[str, Any], float]] = [
    ("ppo", "KL in the reward", {"kl_coef": BETA}, 0.5),
    ("grpo", "k2", {"kl_estimator": "k2", **UNDIVIDED}, 6.0),
    ("dapo", "k2", {"kl_estimator": "k2", **UNDIVIDED}, 6.0),
    ("dr_grpo", "k2", {"kl_estimator": "k2", "kl_coef": BETA}, 6.0),
    ("gspo", "k2", {"kl_estimator": "k2", **UNDIVIDED}, 6.0),
    ("grpo", "k3 (the default)", UNDIVIDED, 3.0),
    ("dr_grpo", "k3 (the default)", {"kl_coef": BETA}, 3.0),
]
"""Algorithm, KL estimator, settings, first step size."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    problems = [problem(seed) for seed in range(args.seeds)]
    optima = [best(reference, rewards) for reference, rewards in problems]
    others = [best_of_the_other_kl(reference, rewards) for reference, rewards in problems]
    seeds = " | ".join(f"seed {seed}" for seed in range(args.seeds))
    lines = [f"| algorithm | KL term | distance | {seeds} |", f"|---|---|---|{'---:|' * args.seeds}"]

    def row(name: str, term: str, distance: str, values: list[float]) -> None:
        lines.append(f"| {name} | {term} | {distance} | {' | '.join(f'{value:.1e}' for value in values)} |")

    starts = [kl(reference.log(), optimum) for (reference, _), optimum in zip(problems, optima)]
    row("before training", "", "KL(pi, pi*)", starts)
    for name, term, settings, rate in RUNS:
        config = resolved(name, settings)
        found = [train(name, config, *given, steps=args.steps, rate=rate) for given in problems]
        row(f"`{name}`", term, "KL(pi, pi*)", [kl(policy, optimum) for policy, optimum in zip(found, optima)])
        if term.startswith("k3"):
            row("", "", "KL(pi, best of the other KL)", [kl(policy, other) for policy, other in zip(found, others)])
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(page(text, args))


def resolved(name: str, settings: dict[str, Any]) -> Any:
    """The training settings as a loss gets them."""
    run = {"model": {"name_or_path": "none"}, "dataset": {"name": "none"}, "rewards": ["length"], "train": settings}
    return resolve(run, algorithm=name).config.train


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Reference probabilities and rewards, [ACTIONS] each."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ACTIONS, generator=generator, dtype=torch.float64)
    return logits.softmax(0), torch.rand(ACTIONS, generator=generator, dtype=torch.float64)


def best(reference: Tensor, rewards: Tensor) -> Tensor:
    """log pi*."""
    return (reference.log() + rewards / BETA).log_softmax(0)


def best_of_the_other_kl(reference: Tensor, rewards: Tensor) -> Tensor:
    """log of beta ref / (lambda - r), with the lambda (by bisection) for which it sums to 1."""
    low, high = rewards.max(), rewards.max() + 10
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * reference / (middle - rewards)).sum() > 1 else (low, middle)
    return (BETA * reference / (middle - rewards)).log()


def kl(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum())


def evenly(probabilities: Tensor) -> Tensor:
    """[SAMPLES] actions in proportion to their probabilities."""
    points = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    return torch.bucketize(points, probabilities.cumsum(0)[:-1])


def train(name: str, config: Any, reference: Tensor, rewards: Tensor, *, steps: int, rate: float) -> Tensor:
    """log-probabilities after `steps` rollouts of one update each, from the reference, with a step size that falls to 0."""
    spec, mask = algorithms.get(name), torch.ones(SAMPLES, 1)
    logits = reference.log().clone().requires_grad_()
    log_probs: Callable[[Tensor, Tensor], Tensor] = lambda of, actions: of.log_softmax(0)[actions].unsqueeze(1)  # noqa: E731
    for step in range(steps):
        actions = evenly(logits.detach().softmax(0))
        old, ref = log_probs(logits.detach(), actions), log_probs(reference.log(), actions)
        scores = rewards[actions].view(
            -1, 1 if name == "ppo" else SAMPLES
        )  # one group of all samples, or a critic at 0
        zero = torch.zeros_like(old)
        made = spec.compute_advantages(ScoredRollouts(scores, mask, torch.ones(SAMPLES), old, ref, zero), config)
        batch = RolloutBatch(
            log_probs(logits, actions), old, mask, made.advantages, ref, values=zero, old_values=zero, returns=zero
        )
        (gradient,) = torch.autograd.grad(spec.loss(batch, config, batch.normalizers(1)).value, logits)
        logits = (logits - rate * (1 - step / steps) * gradient).detach().requires_grad_()
    return logits.detach().log_softmax(0)


def page(table: str, args: argparse.Namespace) -> str:
    return (
        "# The regularised bandit\n\n"
        f"Ten actions, beta {BETA}, {args.steps} updates from the reference; distances in nats, 0 is the optimum. pi* = ref exp(r / beta) / Z\n"
        "maximises E r - beta KL(pi, ref). PPO, and the GRPO family with `kl_estimator: k2`, reach it. GRPO's own k3 as a loss descends\n"
        "KL(ref, pi): it ends at that problem's optimum, beta ref / (lambda - r), and not at pi*. All with `scale_rewards: none`\n"
        "(dividing by the deviation of the rewards changes the problem).\n\n"
        f"{table}\n\n"
        f"`python benchmarks/bandit.py --seeds {args.seeds} --steps {args.steps}`, torch {torch.__version__}, CPU, double precision.\n"
    )


if __name__ == "__main__":
    main()
