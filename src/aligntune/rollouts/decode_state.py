"""What does a decoding loop remember between steps? Tensors of fixed shape and place, so that a CUDA graph can use them.

Shapes: R rows, b of them active (the first b), T new tokens at most, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aligntune.rollouts.base import Rollouts, SamplingParams, cut_at_stop
from aligntune.rollouts.sampling import chosen_log_probs, draw, reshaped, tempered


@dataclass
class DecodeState:
    """tokens: `[R]` the last one of each active row, not yet in the cache. positions: `[R]` tokens in the cache.
    row_ids: `[R]` which completion an active row writes. step: `[1]`. seen: `[R, V]`, with a repetition penalty only.
    out_tokens, out_log_probs, out_sampler: `[R, T]` by completion."""

    params: SamplingParams
    tokens: Tensor
    positions: Tensor
    row_ids: Tensor
    finished: Tensor
    step: Tensor
    seed: Tensor
    stops: Tensor
    out_tokens: Tensor
    out_log_probs: Tensor
    out_sampler: Tensor
    seen: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, params: SamplingParams, vocab: int, device: torch.device) -> DecodeState:
        def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        penalised = params.repetition_penalty != 1
        new = params.max_new_tokens
        return cls(
            params, numbers(rows), numbers(rows), numbers(rows), numbers(rows, dtype=torch.bool), numbers(1), numbers(1),
            torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device),
            numbers(rows, new), numbers(rows, new, dtype=torch.float32), numbers(rows, new, dtype=torch.float32),
            numbers(rows, vocab, dtype=torch.bool) if penalised else None,
        )  # fmt: skip

    def begin(self, prompts: list[list[int]], seed: int) -> None:
        """Rows of these prompts, which are about to be prefilled."""
        count, device = len(prompts), self.tokens.device
        self.positions.zero_()
        self.positions[:count] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.row_ids.copy_(torch.arange(len(self.row_ids), device=device))
        self.finished.zero_()
        self.step.zero_()
        self.seed.fill_(seed)
        if self.seen is not None:
            self.seen.zero_()
            rows = torch.repeat_interleave(torch.tensor([len(prompt) for prompt in prompts]))
            self.seen[rows.to(device), torch.tensor([t for prompt in prompts for t in prompt], device=device)] = True

    def choose(self, logits: Tensor) -> None:
        """Draw the next token of the first b rows from `[b, V]` float32 logits, and advance. No wait for the device."""
        active, params = logits.shape[0], self.params
        rows = self.row_ids[:active]
        seen = None if self.seen is None else self.seen[:active]
        before = tempered(logits, params)
        scores = reshaped(logits, params, seen) if params.reshapes else before
        tokens, sampled = self._draw(scores, rows)
        log_probs = chosen_log_probs(before, tokens) if params.reshapes else sampled
        step = self.step.expand(active)
        self.out_tokens.index_put_((rows, step), tokens)
        self.out_log_probs.index_put_((rows, step), log_probs)
        if not params.greedy:
            self.out_sampler.index_put_((rows, step), sampled)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        self.finished[:active] |= (tokens[:, None] == self.stops).any(1)
        self.tokens[:active] = tokens
        self.positions[:active] += 1
        self.step += 1

    def _draw(self, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        if scores.is_cuda:
            from aligntune.models.kernels.decode_triton import draw_rows

            return draw_rows(scores, self.seed, rows, self.step, self.params.greedy)
        tokens = draw(scores, self.params)
        return tokens, chosen_log_probs(scores, tokens)

    def keep(self, rows: Tensor) -> None:
        """Move these active rows to the front, in that order."""
        for tensor in (self.tokens, self.positions, self.row_ids, self.finished, self.seen):
            if tensor is not None:
                tensor[: len(rows)] = tensor[rows]

    def snapshot(self) -> list[Tensor]:
        """Everything that a step changes and the next reads."""
        changed = (self.tokens, self.positions, self.finished, self.step, self.seen)
        return [x.clone() for x in changed if x is not None]

    def restore(self, snapshot: list[Tensor]) -> None:
        changed = (self.tokens, self.positions, self.finished, self.step, self.seen)
        for tensor, was in zip((x for x in changed if x is not None), snapshot, strict=True):
            tensor.copy_(was)

    def results(self, count: int, steps: int) -> Rollouts:
        """The first `count` completions, cut at their stop tokens."""
        tokens, log_probs, sampler = (
            x[:count, :steps].tolist() for x in (self.out_tokens, self.out_log_probs, self.out_sampler)
        )
        ends = [cut_at_stop(row, self.params.stop_token_ids) for row in tokens]

        def cut(rows: list[list]) -> list[list]:
            return [row[:end] for row, (end, _) in zip(rows, ends, strict=True)]

        return Rollouts(cut(tokens), cut(log_probs), cut(sampler), [finished for _, finished in ends])
