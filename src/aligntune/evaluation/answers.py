"""What does the model answer? Evaluation rows, and greedy answers to them without the reference in sight."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
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


def evaluation_rows(
    examples: Iterable[Example], columns: Iterable[Mapping[str, Any]] | None = None
) -> list[EvaluationRow]:
    """The rows of all examples that have an answer (logged: how many have none).

    Raises:
        DataError: no example has an answer.
    """
    rows = [evaluation_row(*pair) for pair in zip(examples, columns, strict=True)] if columns is not None else [
        evaluation_row(example) for example in examples
    ]  # fmt: skip
    found = [row for row in rows if row is not None]
    if not found:
        raise DataError(
            f"none of the {len(rows)} evaluation rows has a reference answer: metrics of answers need rows with a prompt and "
            "a completion, or conversations that end with the assistant"
        )
    if len(found) < len(rows):
        logger.warning(
            "%d of %d evaluation rows have no reference answer and are left out", len(rows) - len(found), len(rows)
        )
    return found


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
    `batch_size`: prompts answered at a time; like lengths go together. `seed` is for engines that draw random numbers
    even so.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int] = (),
        max_length: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        self.engine, self.tokenizer, self.seed = engine, tokenizer, seed
        self.max_length, self.batch_size, self.extra_stops = max_length, batch_size, tuple(stop_token_ids)

    @classmethod
    def of(
        cls, model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 8, seed: int = 0
    ) -> GreedyGenerator:
        """With transformers' `generate` on `model` itself, its own end tokens and its own longest sequence."""
        from aligntune.models.forward import causal_model
        from aligntune.rollouts.transformers import TransformersEngine

        causal = causal_model(model)
        ends = getattr(causal.generation_config, "eos_token_id", None)
        stops = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        limit = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
        engine = TransformersEngine(model, max_rows=batch_size)
        return cls(engine, tokenizer, stop_token_ids=stops, max_length=limit, batch_size=batch_size, seed=seed)

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
        order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
        answers = [""] * len(ids)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            done = self.engine.generate([ids[at] for at in batch], params)
            for at, tokens in zip(batch, done.completion_ids, strict=True):
                answers[at] = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return answers

    def prompt_ids(self, prompt: Prompt, tools: list[Any] | None = None) -> list[int]:
        """The tokens after which the model answers `prompt`."""
        if isinstance(prompt, str):
            return [*self._raw_start, *self._encode(prompt)]
        return self._encode(self._template.prompt(prompt, tools))

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's end token, the model's own, and the special token with which the template ends a turn."""
        stops = {self.tokenizer.eos_token_id, *self.extra_stops}
        if self.tokenizer.chat_template is not None:
            special = set(self.tokenizer.get_added_vocab().values())
            stops.update([token for token in self._encode(self._template.tails[1]) if token in special][:1])
        return tuple(sorted(token for token in stops if token is not None))

    def _cut(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        if self.max_length is None:
            return prompts
        room = self.max_length - max_new_tokens
        if room < 1:
            raise DataError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt: the model takes {self.max_length}"
            )
        long = sum(len(ids) > room for ids in prompts)
        if long:
            logger.warning(
                "%d of %d evaluation prompts lose their beginning: they exceed %d tokens", long, len(prompts), room
            )
        return [ids[-room:] for ids in prompts]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _template(self) -> ChatTemplate:
        from aligntune.data.template import ChatTemplate

        return ChatTemplate(self.tokenizer)

    @cached_property
    def _raw_start(self) -> tuple[int, ...]:
        from aligntune.data.tokenize import RawEnds

        return RawEnds.of(self.tokenizer).before
