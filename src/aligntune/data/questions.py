"""What would one ask the model, and what should it answer? Prompts and reference answers from rows of any SFT format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from aligntune.config import rl, sft
from aligntune.data.detect import row_reader
from aligntune.data.examples import ChatExample, CompletionExample, Example, PairExample, PromptExample, TextExample
from aligntune.data.messages import Message


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt (raw text, or messages for the chat template), the answer to compare with, and the row's own columns."""

    prompt: str | list[Message]
    reference: str
    tools: list[Any] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def questions(
    rows: Dataset | IterableDataset,
    config: sft.DatasetConfig | rl.DatasetConfig,
    limit: int | None = None,
    kind: Any = "sft",
) -> Iterator[Question]:
    """The question of each row, `limit` at most. Rows without one (no assistant turn, empty text) are left out."""
    reader = row_reader(rows, config, kind)
    found = (_question(reader(row, index), row) for index, row in enumerate(rows))
    return islice((question for question in found if question is not None), limit)


def _question(example: Example, row: Mapping[str, Any]) -> Question | None:
    if isinstance(example, ChatExample):
        places = [place for place, message in enumerate(example.messages) if message["role"] == "assistant"]
        if not places or places[-1] == 0:
            return None
        return Question(example.messages[: places[-1]], example.messages[places[-1]]["content"], example.tools, row)
    if isinstance(example, CompletionExample):
        return Question(example.prompt, example.completion, columns=row)
    if isinstance(example, TextExample):
        words = example.text.split(" ")
        if len(words) < 2:
            return None
        return Question(" ".join(words[: len(words) // 2]), " " + " ".join(words[len(words) // 2 :]), columns=row)
    if isinstance(example, PairExample):
        chosen = example.chosen if isinstance(example.chosen, str) else example.chosen[-1]["content"]
        return Question(example.prompt, chosen, example.tools, row)
    if isinstance(example, PromptExample):
        return Question(example.prompt, "", example.tools, row)
    return None
