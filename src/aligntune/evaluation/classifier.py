"""What does a classifier say? A label with probabilities for each text, or the entities among its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aligntune.data.collate import PaddedCollator
from aligntune.data.labels import align_tags
from aligntune.data.masks import IGNORED
from aligntune.errors import DataError
from aligntune.evaluation.label_scores import spans
from aligntune.models.modes import evaluating

Words = str | Sequence[str]
"""A sentence: its words, or a text that is split at blanks."""


@dataclass
class Classifier:
    """A model with a classification head. `tags`: one class a word rather than one a text.

    `max_length`: tokens that are read; what comes after has no influence, and its words are tagged "O".
    """

    model: Any
    tokenizer: Any
    names: Sequence[str]
    tags: bool
    max_length: int | None = None
    batch_size: int = 8
    dtype: torch.dtype = torch.float32
    """Format of matrix products."""

    def predict(self, inputs: Sequence[Any]) -> list[Any]:
        """Per text `{label, probability, probabilities}`, or per sentence its spans (see `tag`)."""
        return self.tag(inputs) if self.tags else self.classify(inputs)

    def classify(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The likeliest label of each text, its probability, and the probability of every label."""
        ids = [self._encode(text)["input_ids"] for text in texts]
        return [text_record(self.names, row) for row in self.probabilities(ids)]

    def tag(self, sentences: Sequence[Words]) -> list[list[dict[str, Any]]]:
        """The entities of each sentence: `label`, `start` and `end` (words, end excluded), `text`, `probability`."""
        words = [sentence.split() if isinstance(sentence, str) else list(sentence) for sentence in sentences]
        tagged = self.tag_words(words)
        return [spans(self.names, row, *found) for row, found in zip(words, tagged, strict=True)]

    def tag_words(self, sentences: Sequence[Sequence[str]]) -> list[tuple[list[str], list[float]]]:
        """A tag and its probability for each word of each sentence; "O" and 1 for words the model does not see."""
        encoded = [self._encode(" ".join(words), offsets=True) for words in sentences]
        places = [align_tags(row["offset_mapping"], words, range(len(words))) for row, words in zip(encoded, sentences, strict=True)]  # fmt: skip
        found = []
        for words, at, scores in zip(sentences, places, self.probabilities([row["input_ids"] for row in encoded]), strict=True):  # fmt: skip
            tags, sure = ["O"] * len(words), [1.0] * len(words)
            for token in np.flatnonzero(at != IGNORED):
                best = int(scores[token].argmax())
                tags[at[token]], sure[at[token]] = self.names[best], float(scores[token][best])
            found.append((tags, sure))
        return found

    def probabilities(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
        """Class probabilities of token rows in their order: `[C]` each, or `[T, C]` for tags. Like lengths go together."""
        empty = next((place for place, row in enumerate(rows) if not len(row)), None)
        if empty is not None:
            raise DataError(f"input {empty} is empty: there is nothing to classify")
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        found: list[Any] = [None] * len(rows)
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                scores = self._scores([rows[place] for place in batch])
                for place, row in zip(batch, scores, strict=True):
                    found[place] = row[: len(rows[place])] if self.tags else row
        return found

    @torch.no_grad()
    def _scores(self, rows: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
        batch = PaddedCollator(self.tokenizer.pad_token_id)([{"input_ids": row, "labels": 0} for row in rows])
        device = next(self.model.parameters()).device
        with self._precision(device):
            logits = self.model(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
            ).logits
        return np.asarray(logits.float().softmax(-1).cpu().numpy())

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(device.type, dtype=self.dtype)

    def _encode(self, text: str, offsets: bool = False) -> Mapping[str, Any]:
        encoded: Mapping[str, Any] = self.tokenizer(
            text, truncation=self.max_length is not None, max_length=self.max_length, return_offsets_mapping=offsets, verbose=False
        )  # fmt: skip
        return encoded


def text_record(names: Sequence[str], probabilities: Any) -> dict[str, Any]:
    """`{label, probability, probabilities}` of one text."""
    best = int(np.argmax(probabilities))
    shares = {name: float(share) for name, share in zip(names, probabilities, strict=True)}
    return {"label": names[best], "probability": float(probabilities[best]), "probabilities": shares}
