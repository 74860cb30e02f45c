"""What does a supervised token cost, where it is not plain cross-entropy?

A loss of each trained token from its log-probability, any shape. The trainer sums it and divides by the trained tokens of the whole
optimiser batch (all micro-batches and ranks): a mean of means weighs tokens by luck. Cross-entropy itself is
`models.forward.packed_loss`, which needs no log-probabilities.
"""

from __future__ import annotations

from torch import Tensor


def dft(log_probs: Tensor) -> Tensor:
    """pi(y_t) * -log pi(y_t) with the factor held fixed (Dynamic Fine-Tuning, arXiv 2508.05629), which takes the 1 / pi out of the
    gradient, so that unlikely tokens no longer dominate."""
    return -log_probs.detach().exp() * log_probs
