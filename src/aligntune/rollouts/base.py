"""What is a rollout engine? Something that continues prompts and says how likely it was to say that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from aligntune.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.

    max_new_tokens: completion tokens at most, the stop token included.
    temperature: 0 is greedy.
    top_p, top_k, min_p: truncation; 1.0, 0 and 0.0 are off.
    repetition_penalty: over prompt and completion tokens (Keskar et al. 2019, arXiv 1909.05858); 1.0 is off.
    stop_token_ids: a completion ends with the first of these, which is part of it.
    seed: completions depend on it, the prompts and the weights alone; None draws from torch's global random state.
    num_generations: completions per prompt; those of prompt p are rows p * G to p * G + G - 1.
    generation_kwargs: further arguments of the engine's own library; an engine refuses those that it does not know.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    num_generations: int = 1
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        strange = [name for name in numbers if not isinstance(getattr(self, name), int | float)]
        if strange:
            raise ConfigError(f"sampling setting {strange[0]}={getattr(self, strange[0])!r} should be a number")
        bounds = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "num_generations": self.num_generations >= 1,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, holds in bounds.items() if not holds]
        if wrong:
            raise ConfigError(f"sampling settings out of range: {', '.join(wrong)}")

    @classmethod
    def build(cls, generation_kwargs: Mapping[str, Any] | None = None, **settings: Any) -> SamplingParams:
        """From the config's settings, with `generation_kwargs` on top where they name a field of this class (an unset
        `None` there is the field's default); the rest stays in `generation_kwargs`."""
        own = {f.name for f in fields(cls)} - {"generation_kwargs"}
        extra = dict(generation_kwargs or {})
        lifted = {name: extra.pop(name) for name in list(extra) if name in own}
        settings |= {name: value for name, value in lifted.items() if value is not None}
        return cls(**settings, generation_kwargs=extra)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def reshapes(self) -> bool:
        """Whether penalties or truncation make the sampled distribution another than the tempered one."""
        truncates = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return truncates or self.repetition_penalty != 1 or bool(self.generation_kwargs)


@dataclass
class Rollouts:
    """B = prompts x num_generations completions.

    completion_ids: tokens, the stop token included; never empty.
    log_probs: of each token under the *tempered* distribution `softmax(logits / temperature)` (of `softmax(logits)` when
        greedy), before penalties and truncation: what a trainer's update computes, so that a difference between the two
        is the engines' numerics alone. None from an engine that cannot tell (vLLM with truncation or penalties).
    sampler_log_probs: under the distribution that was sampled from, after penalties and truncation (0 when greedy). The
        same numbers as `log_probs` when nothing reshapes.
    finished: ended with a stop token, rather than by `max_new_tokens`.
    """

    completion_ids: list[list[int]]
    log_probs: list[list[float]] | None
    sampler_log_probs: list[list[float]]
    finished: list[bool]

    def __len__(self) -> int:
        return len(self.completion_ids)


class RolloutEngine(Protocol):
    """Continues prompts with the current policy."""

    name: str

    def generate(self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams) -> Rollouts:
        """Completions of token prompts (each at least one token)."""

    def update_weights(self) -> None:
        """Take over the policy's weights after an optimiser step; nothing to do for engines that share them."""

    def release(self) -> None:
        """Give back the memory that is kept from one rollout to the next; the next one takes it anew."""


def check_prompts(prompt_ids: Sequence[Sequence[int]]) -> None:
    """ConfigError if a prompt has no token to start from."""
    empty = [i for i, prompt in enumerate(prompt_ids) if not prompt]
    if empty:
        raise ConfigError(f"prompt {empty[0]} has no tokens: a rollout needs at least one token to start from")


def refuse_extra(engine: str, params: SamplingParams) -> None:
    """ConfigError if there are generation_kwargs, for engines that take none."""
    if params.generation_kwargs:
        names = ", ".join(sorted(params.generation_kwargs))
        raise ConfigError(
            f"the rollout engine '{engine}' does not know the generation_kwargs {names}: remove them, or choose the engine 'transformers'"
        )


def cut_at_stop(tokens: Sequence[int], stop_token_ids: Sequence[int]) -> tuple[int, bool]:
    """How many tokens up to and with the first stop token, and whether there was one."""
    stops = set(stop_token_ids)
    for i, token in enumerate(tokens):
        if token in stops:
            return i + 1, True
    return len(tokens), False
