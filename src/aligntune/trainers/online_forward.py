"""What do policy and critic predict for the completions of a rollout? One forward pass, through the model's wrappers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from aligntune.models.forward import model_head, trunk_hidden
from aligntune.models.kernels.linear_loss import linear_log_probs
from aligntune.models.packed import PackedRows
from aligntune.models.wrapped import run_as_forward, unwrapped
from aligntune.trainers.critic import Critic

MEASURED_TOKENS = 8192
"""Tokens of a forward pass without gradient."""


@dataclass(frozen=True)
class Predictions:
    """[M] each, of the trained tokens of `PackedRows`."""

    log_probs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


class Forward:
    """Log-probabilities and entropy of the distribution at `temperature`, and the critic's values. A critic without a trunk of
    its own shares the policy's pass."""

    def __init__(self, critic: Critic | None, temperature: float) -> None:
        self.critic, self.temperature = critic, temperature

    def __call__(
        self, wrapped: nn.Module, rows: PackedRows, *, entropy: bool = False, entropy_grad: bool = False
    ) -> Predictions:
        policy = unwrapped(wrapped)

        def compute(_input_ids: Tensor) -> tuple[Tensor, ...]:
            hidden = trunk_hidden(policy, rows)[rows.predictors]
            head = model_head(policy)
            found = linear_log_probs(
                hidden,
                head.weight,
                rows.targets,
                **head.arguments(self.temperature),
                entropy=entropy,
                entropy_grad=entropy_grad,
            )
            values = () if self.critic is None else (self.critic(rows, hidden),)
            return (found.log_probs, *((found.entropy,) if found.entropy is not None else ()), *values)

        parts = list(run_as_forward(wrapped, compute, rows.input_ids))
        log_probs = parts.pop(0)
        entropies = parts.pop(0) if entropy else None
        return Predictions(log_probs, entropies, parts.pop(0) if parts else None)


def scatter(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Put [b, L] values into the rows of a [B, T] target, L <= T."""
    target[rows, : values.shape[1]] = values.to(target.device, target.dtype)
