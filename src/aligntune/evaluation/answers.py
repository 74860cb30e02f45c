"""What does the model answer? Evaluation rows, and greedy answers to them without the reference in sight."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from aligntune.data.examples import ChatExample, CompletionExample, Example, PairExample
from aligntune.data.messages import Message
from aligntune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aligntune.data.template import ChatTemplate
    from aligntune.rollouts.base import RolloutEngine

logger = logging.getLogger(__name__)

Prompt = str | list[Message]
"""Raw text, or the messages before the answer."""


@dataclass(frozen=True)
class EvaluationRow:
    """A prompt, the answer it should get, and the row's other columns for metrics that ask for them."""

    prompt: Prompt
    reference: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None


def evaluation_row(example: Example, columns: Mapping[str, Any] | None = None) -> EvaluationRow | None:
    """The row of an example, or None if it has no answer to compare with.

    A conversation is cut before its last assistant turn, which is the reference; a pair's is its chosen answer.
    """
    columns = dict(columns or {})
    if isinstance(example, CompletionExample):
        return EvaluationRow(example.prompt, example.completion, columns) if example.completion.strip() else None
    if isinstance(example, ChatExample):
        return _cut(example.messages, columns, example.tools)
    if isinstance(example, PairExample):
        if isinstance(example.prompt, str):
            return EvaluationRow(example.prompt, str(example.chosen), columns) if str(example.chosen).strip() else None
        return _cut([*example.prompt, *example.chosen], columns, example.tools)  # type: ignore[list-item]
    return None


def _cut(messages: list[Message], columns: Mapping[str, Any], tools: list[Any] | None) -> EvaluationRow | None:
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    reference = str(messages[last].get("content") or "")
    if last == 0 or not reference.strip():
        return None
    return EvaluationRow(messages[:last], reference, columns, tools)


def choose(count: int, max_samples: int | None, seed: int = 0) -> list[int]:
    """Which of `count` rows are answered: all, or `max_samples` drawn by `seed`, in their order."""
    if max_samples is None or count <= max_samples:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), max_samples))


class TextGenerator(Protocol):
    """Answers prompts, each by itself and always in the same way."""

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, tools: Sequence[list[Any] | None] | None = None
    ) -> list[str]:
        """One answer per prompt, without special tokens."""


class GreedyGenerator:
    """Greedy answers by a rollout engine: messages through the tokenizer's chat template, raw prompts as in training.

    `max_length`: tokens of prompt and answer together that the model takes; a longer prompt loses its beginning (logged).
    The engine gets all prompts at once and takes as many at a time as it likes; like lengths go together. `seed` is for
    engines that draw random numbers even so.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int] = (),
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.engine, self.tokenizer, self.seed = engine, tokenizer, seed
        self.max_length, self.extra_stops = max_length, tuple(stop_token_ids)

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: RolloutEngine | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> GreedyGenerator:
        """With the end tokens and the longest sequence of `model`. `engine`: unset, the fastest that runs the model, with
        `batch_size` rows at a time (None: as many as are sensible)."""
        from aligntune.models.forward import causal_model
        from aligntune.rollouts.occasional import occasional_engine

        limit = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None)
        engine = engine or occasional_engine(model, max_rows=batch_size)[0]
        return cls(engine, tokenizer, stop_token_ids=model_ends(model), max_length=limit, seed=seed)

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, tools: Sequence[list[Any] | None] | None = None
    ) -> list[str]:
        """See `TextGenerator`. The tokenizer and the model are left as found."""
        from aligntune.rollouts.base import SamplingParams

        ids = self._cut(
            [self.prompt_ids(*pair) for pair in zip(prompts, tools or [None] * len(prompts), strict=True)],
            max_new_tokens,
        )
        params = SamplingParams(
            max_new_tokens=max_new_tokens, temperature=0.0, stop_token_ids=self.stop_token_ids, seed=self.seed
        )
        # Longest first: a cache that holds those holds the others too.
        order = sorted(range(len(ids)), key=lambda at: -len(ids[at]))
        done = self.engine.generate([ids[at] for at in order], params)
        answers = [""] * len(ids)
        for at, tokens in zip(order, done.completion_ids, strict=True):
            answers[at] = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return answers

    def prompt_ids(self, prompt: Prompt, tools: list[Any] | None = None) -> list[int]:
        """The tokens after which the model answers `prompt`."""
        if isinstance(prompt, str):
            return [*self._raw_start, *self._encode(prompt)]
        return self._encode(self._template.prompt(prompt, tools))

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """See `answer_ends`."""
        return answer_ends(self.tokenizer, self.extra_stops)

    def _cut(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        if self.max_length is None:
            return prompts
        room = self.max_length - max_new_tokens
        if room < 1:
            raise DataError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt: the model takes {self.max_length} "
                "tokens in all; lower it (evaluation.max_new_tokens)"
            )
        long = sum(len(ids) > room for ids in prompts)
        if long:
            logger.warning(
                "%d of %d evaluation prompts lose their beginning: they exceed %d tokens", long, len(prompts), room
            )
        return [ids[-room:] for ids in prompts]

    def _encode(self, text: str) -> list[int]:
        return _encode(self.tokenizer, text)

    @cached_property
    def _template(self) -> ChatTemplate:
        from aligntune.data.template import ChatTemplate

        return ChatTemplate(self.tokenizer)

    @cached_property
    def _raw_start(self) -> tuple[int, ...]:
        from aligntune.data.tokenize import RawEnds

        return RawEnds.of(self.tokenizer).before


def answer_ends(tokenizer: PreTrainedTokenizerBase, own: Sequence[int] = ()) -> tuple[int, ...]:
    """The tokenizer's end token, the model's `own`, and the special token with which the template ends a turn."""
    from aligntune.data.template import ChatTemplate

    stops = {tokenizer.eos_token_id, *own}
    if tokenizer.chat_template is not None:
        special = set(tokenizer.get_added_vocab().values())
        stops.update([token for token in _encode(tokenizer, ChatTemplate(tokenizer).tails[1]) if token in special][:1])
    return tuple(sorted(token for token in stops if token is not None))


def model_ends(model: Any) -> list[int]:
    """The end tokens that the model's generation config names."""
    from aligntune.models.forward import causal_model

    ends = getattr(causal_model(model).generation_config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
