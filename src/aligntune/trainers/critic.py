"""The value model of PPO: a linear head on the policy's own hidden states, or on a model of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from aligntune.models.forward import trunk_hidden
from aligntune.models.packed import PackedRows


class Critic(nn.Module):
    """V(s) before each completion token, from the hidden state that predicts it.

    `trunk` None: the policy's trunk, whose hidden states the caller passes. The head starts at zero, so that the first
    advantages are those of the rewards alone (arXiv 2403.17031 draws it with deviation 1/sqrt(h+1)).
    """

    def __init__(self, hidden_size: int, trunk: Any | None = None, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head if head is not None else nn.Linear(hidden_size, 1)
        if head is None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, rows: PackedRows, policy_hidden: Tensor | None = None) -> Tensor:
        """[M] values of the trained positions of `rows`; `policy_hidden` [M, H] when the trunk is the policy's."""
        if self.trunk is None:
            assert policy_hidden is not None, "a head on the policy's trunk needs its hidden states"
            hidden = policy_hidden
        else:
            hidden = trunk_hidden(self.trunk, rows)[rows.predictors]
        return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()


class CriticGradients(TrainerCallback):
    """The critic is outside the policy's wrapper: its gradients are averaged over processes, clipped and cleared here."""

    def __init__(self, critic: Critic, world: int) -> None:
        self.critic, self.world = critic, world

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in self.critic.parameters() if parameter.grad is not None]
        if self.world > 1:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= self.world
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.critic.zero_grad()
