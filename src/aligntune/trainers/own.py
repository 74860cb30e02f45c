"""Which functions and callbacks of a run are the user's own? A loss, advantages, transformers' callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from aligntune.algorithms.base import AdvantageFunction, Advantages, AlgorithmSpec, LossFunction
from aligntune.algorithms.batch import Loss, Normalizers
from aligntune.config.run import RLRunConfig, SFTRunConfig
from aligntune.data.functions import find_function
from aligntune.errors import ConfigError


def with_own_functions(spec: AlgorithmSpec, train: Any) -> AlgorithmSpec:
    """`spec` with `train.loss_function` and `train.advantage_function` in place of the algorithm's, where they are given.

    What the algorithm measures (clipped shares, implied rewards, KL) is measured still, beside what the own loss adds.
    """
    loss, advantages = train.loss_function, train.advantage_function
    if loss is not None:
        spec = replace(spec, loss=_own_loss(find_function(loss, "train.loss_function"), spec.loss))
    if advantages is not None:
        spec = replace(spec, advantages=_own_advantages(find_function(advantages, "train.advantage_function")))
    return spec


def own_token_loss(address: Any) -> Callable[[Tensor], Tensor]:
    """`train.loss_function` of supervised fine-tuning: [M] log-probabilities of the trained tokens -> [M] losses."""
    function = find_function(address, "train.loss_function")

    def token_loss(log_probs: Tensor) -> Tensor:
        found = function(log_probs)
        if not isinstance(found, Tensor) or found.shape != log_probs.shape:
            raise ConfigError(
                f"train.loss_function: should return the loss of each token, {tuple(log_probs.shape)}, got {_shown(found)}"
            )
        return found

    return token_loss


def own_callbacks(run: SFTRunConfig | RLRunConfig) -> list[TrainerCallback]:
    """The `train.callbacks` of a run, made where they are classes."""
    found = []
    for given in run.train.callbacks or []:
        callback = find_function(given, "train.callbacks") if isinstance(given, str) else given
        made = callback() if isinstance(callback, type) else callback
        if not isinstance(made, TrainerCallback):
            raise ConfigError(f"train.callbacks: {given!r} is no TrainerCallback of transformers")
        found.append(made)
    return found


def _own_loss(function: Callable[..., Any], usual: LossFunction) -> LossFunction:
    def loss(batch: Any, config: Any, normalizers: Normalizers) -> Loss:
        found = function(batch, config, normalizers)
        made = Loss(found) if isinstance(found, Tensor) else found
        if not isinstance(made, Loss) or made.value.dim():
            raise ConfigError(f"train.loss_function: should return a Loss or a scalar tensor, got {_shown(found)}")
        with torch.no_grad():
            measured = usual(batch, config, normalizers).metrics
        kept = {name: value for name, value in measured.items() if not name.startswith("loss")}
        return Loss(made.value, kept | made.metrics | {"loss": made.value.detach()})

    return loss


def _own_advantages(function: Callable[..., Any]) -> AdvantageFunction:
    def advantages(rollouts: Any, config: Any, all_sum: Any) -> Advantages:
        found = function(rollouts, config, all_sum)
        made = Advantages(found) if isinstance(found, Tensor) else found
        rows = rollouts.completion_mask.shape
        if not isinstance(made, Advantages) or made.advantages.shape not in (rows, rows[:1]):
            raise ConfigError(
                f"train.advantage_function: should return one advantage a completion, {tuple(rows[:1])}, or one a token, {tuple(rows)}, "
                f"got {_shown(found)}"
            )
        return made

    return advantages


def _shown(found: Any) -> str:
    return f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__} {found!r:.80}"
