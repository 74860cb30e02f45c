"""Who answers questions to the model of a run, before, between and after its steps?"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

from aligntune.config import rl, sft
from aligntune.config.problems import short
from aligntune.data import row_reader
from aligntune.data.examples import Example
from aligntune.data.formats import Kind
from aligntune.errors import DataError
from aligntune.evaluation.answers import EvaluationRow, GreedyGenerator, Prompt, evaluation_row
from aligntune.rollouts.occasional import occasional_engine
from aligntune.trainers.replica import will_be_sharded
from aligntune.trainers.session import Session

logger = logging.getLogger(__name__)


class AnsweringSession(Session):
    """A run whose rows are questions with answers: the model is asked a few of them, and what a user likes."""

    row_kind: Kind
    """What its rows are read as."""
    samples: int
    """Questions answered before and after training, for the report."""

    @property
    @abstractmethod
    def chats(self) -> bool:
        """Whether a user's text is put as a message, rather than raw."""

    @property
    @abstractmethod
    def answer_tokens(self) -> int:
        """Longest answer while a user sets none."""

    @property
    def sample_tokens(self) -> int:
        """Longest answer of the report."""
        return self.answer_tokens

    def question(self, example: Example, columns: Mapping[str, Any]) -> EvaluationRow | None:
        """What is asked of a row, with the answer it should get; None where it has none."""
        return evaluation_row(example, columns)

    @cached_property
    def generator(self) -> GreedyGenerator:
        """Greedy answers of the model as it is when asked."""
        return generator_of(self)

    def questions(self, source: sft.DatasetConfig | rl.DatasetConfig, limit: int | None = None) -> list[EvaluationRow]:
        """The first `limit` rows of a dataset that have an answer, or all."""
        rows = self.raw_rows(source)
        read = row_reader(rows, source, self.row_kind)
        found = (self.question(read(row, index), row) for index, row in enumerate(rows))
        return list(islice((question for question in found if question is not None), limit))

    @cached_property
    def sample_questions(self) -> list[EvaluationRow]:
        """A few questions from the evaluation data, else from the training data."""
        return self.questions(self.config.eval_source or self.config.sources[0], self.samples)

    def show_samples(self, step: int) -> None:
        asked = self.sample_questions
        for question, text in zip(asked, self.answers(asked, self.sample_tokens), strict=True):
            self.recorder.sample(step, {"prompt": question.prompt, "completion": text, "reference": question.reference})

    def predict(self, inputs: Sequence[Any], *, max_new_tokens: int | None = None) -> list[str]:  # type: ignore[override]
        """Greedy answers. Each input is a text (a user message where the rows are chats), or a list of messages."""
        asked = [EvaluationRow(self.as_prompt(item), "") for item in read_questions(inputs)]
        return self.answers(asked, max_new_tokens or self.answer_tokens)

    def as_prompt(self, item: Prompt) -> Prompt:
        """A text or a conversation as the run's prompts are."""
        return [{"role": "user", "content": item}] if isinstance(item, str) and self.chats else item

    def answers(self, asked: Sequence[EvaluationRow], max_new_tokens: int) -> list[str]:
        """Greedy answers, of `max_new_tokens` at most."""
        if not asked:
            return []
        prompts, tools = [question.prompt for question in asked], [question.tools for question in asked]
        return self.generator.generate(prompts, max_new_tokens=max_new_tokens, tools=tools)


def generator_of(session: Any) -> GreedyGenerator:
    """Greedy answers of the session's model as it is when asked, in the number format in which it is trained.

    Weights that are split over processes are gathered layer by layer inside transformers' `generate`: a few answers are not
    worth a whole copy on each device.
    """
    model, precision = session.model, session.precision
    if will_be_sharded():
        engine, why = occasional_engine(model, name="transformers")[0], "weights are sharded"
    else:
        engine, why = occasional_engine(model, compute=precision.compute if precision.autocasts else None)
    logger.info("answers by engine %s (%s)", engine.name, why)
    return GreedyGenerator.of(model, session.tokenizer, engine=engine, seed=session.config.train.seed)


def read_questions(inputs: Any) -> list[Any]:
    """What `predict` is asked: texts, or conversations as lists of messages; a text alone is a list of one."""
    asked = [inputs] if isinstance(inputs, str) else list(inputs)
    for item in asked:
        chat = isinstance(item, (list, tuple)) and all(isinstance(part, Mapping) and "role" in part for part in item)
        if not isinstance(item, str) and not (chat and item):
            alone = isinstance(item, Mapping) and "role" in item
            raise DataError(
                f"predict: each input should be a text, or a list of messages ({{'role': ..., 'content': ...}}), got {short(item)}"
                + ("; put the messages of one conversation into a list of their own" if alone else "")
            )
    return asked
