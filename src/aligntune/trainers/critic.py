"""What is PPO's value model? A linear head on the policy's own hidden states, or on a model of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

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


class CriticUpdates(TrainerCallback):
    """Trains the critic with an optimiser of its own, of the policy's kind and at its learning rate, without weight decay.

    The critic is outside the policy's wrapper, so that its gradients are averaged over processes and clipped here; FSDP and
    DeepSpeed take no optimiser that holds other weights than the model's.
    """

    def __init__(self, critic: Critic, trainer: Trainer) -> None:
        self.critic, self.trainer = critic, trainer
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        own = {name: value for name, value in options.items() if name not in ("params", "model", "optimizer_dict")}
        trained = [parameter for parameter in critic.parameters() if parameter.requires_grad]
        self.optimizer = kind([{"params": trained, "weight_decay": 0.0}], **own)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called with the gradients of the whole optimiser batch, right before the policy's own step."""
        accelerator, scaler = self.trainer.accelerator, self.trainer.accelerator.scaler
        if accelerator.num_processes > 1:
            for parameter in self.critic.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.optimizer.param_groups[0]["lr"]
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), args.max_grad_norm)
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
