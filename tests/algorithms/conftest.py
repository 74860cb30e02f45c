"""Random batches for the loss tests, in float64 so that sums in another order agree."""

from __future__ import annotations

import pytest
import torch

from aligntune.algorithms import PairBatch, RolloutBatch


def random_rollouts(rows: int = 6, tokens: int = 5, seed: int = 0, spread: float = 0.4) -> RolloutBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs = -1.5 + 0.5 * normal(rows, tokens)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    values = normal(rows, tokens)
    return RolloutBatch(
        log_probs=log_probs.requires_grad_(),
        old_log_probs=log_probs.detach() + spread * normal(rows, tokens),
        completion_mask=torch.arange(tokens) < lengths.unsqueeze(1),
        advantages=normal(rows),
        ref_log_probs=log_probs.detach() + spread * normal(rows, tokens),
        sampler_log_probs=log_probs.detach() + 0.01 * normal(rows, tokens),
        values=values.clone().requires_grad_(),
        old_values=values + spread * normal(rows, tokens),
        returns=normal(rows, tokens),
        entropy=normal(rows, tokens).abs().requires_grad_(),
    )


def random_pairs(rows: int = 6, tokens: int = 5, seed: int = 0, spread: float = 0.4) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for side in ("chosen", "rejected"):
        log_probs = -1.5 + 0.5 * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
        parts[f"{side}_log_probs"] = log_probs.clone().requires_grad_()
        parts[f"{side}_mask"] = torch.arange(tokens) < lengths.unsqueeze(1)
        noise = spread * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
        parts[f"ref_{side}_log_probs"] = log_probs + noise
        parts[f"{side}_log_collision"] = log_probs - 0.3 * noise.abs()
    return PairBatch(**parts)


@pytest.fixture(scope="session")
def rollouts():
    return random_rollouts


@pytest.fixture(scope="session")
def pairs():
    return random_pairs
