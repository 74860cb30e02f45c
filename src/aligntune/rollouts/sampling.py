"""From logits to the distribution that is sampled, and to the log-probabilities of what was drawn.

Tensors only, no data-dependent control flow: the same functions run inside a CUDA graph (where a kernel of
`decode_triton` replaces `draw`) and inside `generate`.
Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aligntune.rollouts.base import SamplingParams


def tempered(logits: Tensor, params: SamplingParams) -> Tensor:
    """`[B, V]` float32 scores of the distribution whose log-probabilities are reported."""
    scores = logits.float()
    return scores if params.temperature in (0, 1) else scores / params.temperature


def reshaped(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """`[B, V]` float32 scores of the distribution that is sampled; `seen` `[B, V]` marks tokens of prompt and completion."""
    scores = logits.float()
    if params.repetition_penalty != 1 and seen is not None:
        factor = params.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
    scores = tempered(scores, params)
    if params.top_k > 0:
        floor = scores.topk(min(params.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if params.top_p < 1:
        scores = _top_p(scores, params.top_p)
    if params.min_p > 0:
        log_p = scores.log_softmax(-1)
        floor = log_p.amax(-1, keepdim=True) + math.log(params.min_p)
        scores = scores.masked_fill(log_p < floor, -torch.inf)
    return scores


def _top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al. 2020)."""
    ordered, order = scores.sort(dim=-1, descending=True)
    p = ordered.softmax(-1)
    drop = (p.cumsum(-1) - p) >= top_p  # what the tokens before this one hold already
    return scores.masked_fill(torch.empty_like(drop).scatter_(-1, order, drop), -torch.inf)


def draw(scores: Tensor, params: SamplingParams) -> Tensor:
    """`[B]` tokens: the argmax when greedy, else one draw from `softmax(scores)` by the inverse of its distribution
    function, which costs one random number a row. A token of probability zero is never drawn; of scores that are NaN it is
    the last."""
    if params.greedy:
        return scores.argmax(-1)
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    at = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)


def chosen_log_probs(scores: Tensor, tokens: Tensor) -> Tensor:
    """`[B]` log-probability of each row's token under `softmax(scores)`."""
    return scores.gather(-1, tokens[:, None]).squeeze(-1) - scores.logsumexp(-1)
