"""What does a supervised token cost?

nll: -log pi(y_t). dft: pi(y_t) * -log pi(y_t) with the factor held fixed (Dynamic Fine-Tuning, arXiv 2508.05629), which takes
the 1 / pi out of the gradient, so that unlikely tokens no longer dominate. Both are summed over the trained tokens and
divided by their number in the whole optimiser batch (all micro-batches and ranks): a mean of means weighs tokens by luck.
"""

from __future__ import annotations

from torch import Tensor

from aligntune.algorithms.ops import divide, masked
from aligntune.errors import ConfigError


def token_loss(loss_type: str, log_probs: Tensor) -> Tensor:
    """Loss of each target token, any shape, from its log-probability."""
    match loss_type:
        case "nll":
            return -log_probs
        case "dft":
            return -log_probs.detach().exp() * log_probs
    raise ConfigError(f"loss_type is '{loss_type}'; it should be nll or dft")


def supervised_loss(
    loss_type: str,
    log_probs: Tensor,
    mask: Tensor,
    num_tokens: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    mean_log_probs: Tensor | None = None,
) -> Tensor:
    """This micro-batch's share of the mean loss over `num_tokens` target tokens.

    log_probs: of the targets, any shape (a masked one may be anything). mask: the same shape, true where a token is trained.
    label_smoothing: weight of the uniform target, which needs `mean_log_probs`, the mean of log pi over the vocabulary.
    """
    mask = mask.bool()
    losses = token_loss(loss_type, masked(log_probs, mask))
    if label_smoothing > 0:
        if mean_log_probs is None:
            raise ValueError("label smoothing needs the mean log-probability over the vocabulary")
        losses = (1 - label_smoothing) * losses - label_smoothing * mean_log_probs
    return divide(masked(losses, mask).sum(), num_tokens)
