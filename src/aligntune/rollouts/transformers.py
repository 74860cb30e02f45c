"""Rollouts by `model.generate`: works for every causal model that transformers can run, on any device.

Prompts are padded on the left. The model, its mode, its generation config and torch's random state are left as found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from aligntune.errors import ConfigError
from aligntune.models.forward import causal_model, input_device
from aligntune.models.kernels.compile import decoding_layers
from aligntune.models.modes import evaluating
from aligntune.models.positions import check_positions
from aligntune.models.wrapped import entered_below
from aligntune.rollouts.base import Rollouts, SamplingParams, check_prompts, cut_at_stop
from aligntune.rollouts.sampling import chosen_log_probs, reshaped, tempered

_RESULT = "rollouts read tokens alone"
_OTHER = "rollouts draw one token after another from the policy alone"
NOT_TAKEN = {
    "stop_strings": "a completion ends with a token, which stop_token names",
    "pad_token_id": "padding is never seen",
    "use_cache": "the cache is always used",
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        _RESULT,
    ),
    **dict.fromkeys(("guidance_scale", "prompt_lookup_num_tokens", "penalty_alpha", "dola_layers"), _OTHER),
}
"""Arguments of `generate` that would contradict this engine, or not act, and why. Those with a setting of their own are
refused with the settings (`config.rl_contradictions`)."""


class TransformersEngine:
    """`generate` on the trainer's own model, LoRA adapters live.

    `max_rows` bounds the rows of one `generate` call (memory of the KV cache); None takes all at once.
    """

    name = "transformers"

    def __init__(self, model: nn.Module, *, max_rows: int | None = None) -> None:
        self.model, self.max_rows = model, max_rows

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """See `RolloutEngine`."""
        check_prompts(prompt_ids)
        causal = causal_model(self.model)
        check_positions(causal, max(map(len, prompt_ids), default=0) + params.max_new_tokens)
        rows = [list(prompt) for prompt in prompt_ids for _ in range(params.num_generations)]
        size = self.max_rows or max(1, len(rows))
        result = Rollouts([], [], [], [])
        as_found, seed = _as_found(self.model, causal), seeded(params.seed, input_device(causal))
        with as_found, seed, entered_below(self.model, causal), torch.no_grad():
            for start in range(0, len(rows), size):
                _append(result, *_generate(causal, rows[start : start + size], params), params)
        return result

    def update_weights(self) -> None:
        """Nothing to do: the weights are the trainer's."""

    def release(self) -> None:
        """Nothing to do: `generate` keeps nothing."""


def _generate(causal: Any, rows: list[list[int]], params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Completions, tempered and sampler log-probabilities, `[B, T]` each."""
    width, device = max(map(len, rows)), input_device(causal)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    recorder = _Recorder(params, ids, mask)
    hook = causal.register_forward_hook(recorder.see_logits)
    try:
        out = causal.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_generation_config(params),
            logits_processor=LogitsProcessorList([recorder]),
        )
    finally:
        hook.remove()
    completions = out[:, width:]
    return completions, *recorder.finish(completions)


def _generation_config(params: SamplingParams) -> GenerationConfig:
    """Temperature and truncation stay neutral here: the recorder applies them, so that it knows what was sampled from."""
    extra = dict(params.generation_kwargs)
    if extra.get("num_beams", 1) != 1:
        raise ConfigError("num_beams in generation_kwargs: rollouts sample, they do not search; remove it")
    for name, instead in NOT_TAKEN.items():
        if name in extra:
            raise ConfigError(f"{name} in generation_kwargs: {instead}; remove it")
    unknown = sorted(set(extra) - set(GenerationConfig().to_dict()))
    if unknown:
        raise ConfigError(f"transformers' GenerationConfig has no {', '.join(unknown)}: check generation_kwargs")
    stop = list(params.stop_token_ids) or None
    neutral: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    return GenerationConfig(
        max_new_tokens=params.max_new_tokens, do_sample=not params.greedy, eos_token_id=stop,
        pad_token_id=stop[0] if stop else 0, use_cache=True, **(neutral if not params.greedy else {}), **extra,
    )  # fmt: skip


class _Recorder(LogitsProcessor):
    """Applies temperature, penalties and truncation, and keeps the log-probability of every token that was drawn.

    A step's token is known when the next step begins, so one step's scores wait here, never more.
    """

    def __init__(self, params: SamplingParams, ids: Tensor, mask: Tensor) -> None:
        self.params, self.ids, self.mask = params, ids, mask
        self.seen: Tensor | None = None
        self.raw: Tensor | None = None
        self.waiting: tuple[Tensor, Tensor] | None = None
        self.tempered: list[Tensor] = []
        self.sampler: list[Tensor] = []

    def see_logits(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Forward hook: the model's own logits, before any processor of transformers."""
        self.raw = output.logits[:, -1].to(self.ids.device, torch.float32, copy=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by `generate` with the scores `[B, V]` of one step."""
        if self.waiting is not None:
            self._record(input_ids[:, -1])
        assert self.raw is not None, "the forward hook runs before the processors"
        if self.params.repetition_penalty != 1:
            self._mark_seen(input_ids, scores)
        final = reshaped(scores, self.params, self.seen)
        self.waiting = (tempered(self.raw, self.params), final)
        return final.masked_fill(final.isnan(), 0.0)  # `generate` cannot draw from NaN; its log-probability stays that

    def _mark_seen(self, input_ids: Tensor, scores: Tensor) -> None:
        if self.seen is None:
            counts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
            self.seen = counts.scatter_add_(1, self.ids, self.mask.int()) > 0  # padding is not seen
        else:
            self.seen.scatter_(1, input_ids[:, -1:], True)

    def _record(self, tokens: Tensor) -> None:
        assert self.waiting is not None, "a token is recorded after its scores"
        before, final = self.waiting
        self.waiting = None
        self.tempered.append(chosen_log_probs(before, tokens))
        if self.params.greedy:
            self.sampler.append(torch.zeros_like(self.tempered[-1]))
        else:
            self.sampler.append(chosen_log_probs(final, tokens) if self.params.reshapes else self.tempered[-1])

    def finish(self, completions: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T]` tempered and sampler log-probabilities of the completions."""
        steps = completions.shape[1]
        if len(self.tempered) < steps:  # generate may look one step further than it returns
            self._record(completions[:, -1])
        return torch.stack(self.tempered[:steps], 1), torch.stack(self.sampler[:steps], 1)


def _append(result: Rollouts, tokens: Tensor, log_probs: Tensor, sampler: Tensor, params: SamplingParams) -> None:
    assert result.log_probs is not None, "created with a list"
    for row, p, q in zip(tokens.tolist(), log_probs.tolist(), sampler.tolist(), strict=True):
        length, finished = cut_at_stop(row, params.stop_token_ids)
        result.completion_ids.append(row[:length])
        result.log_probs.append(p[:length])
        result.sampler_log_probs.append(q[:length])
        result.finished.append(finished)


@contextmanager
def _as_found(model: nn.Module, causal: Any) -> Iterator[None]:
    """Evaluation mode and a blank generation config, for the moment: a hub
    model's own generation_config.json would otherwise fill in its penalties and truncation."""
    config, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        with evaluating(model), decoding_layers(causal, compiled=False):
            yield
    finally:
        causal.generation_config = config


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's random state set to `seed` and put back afterwards; with None it is used and advanced as it is."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
