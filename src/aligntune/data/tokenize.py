"""Which tokens does a row become, and which of them are trained?

Every row becomes `input_ids` [n], `labels` [n] (-100 where not trained) and `length` n. The first label is always -100: no
token predicts it, and a packed or padding-free batch then has the same loss as a padded one.

- Conversations are rendered by the chat template and tokenised once. Trained are all tokens, or by `completion_only_loss` what
  follows the prompt, or by `assistant_only_loss` the assistant's turns with their end-of-turn token; both together, the
  assistant's turns that follow the prompt. A conversation without a marked prompt is prompt up to its last assistant turn.
- Raw text gets the tokenizer's own special tokens and an end-of-sequence token. Raw prompts and completions are joined as
  they are, and their completion is trained unless `completion_only_loss` is False.

A row whose mask is empty as it stands is an error that shows the row. Empty texts, and rows of which `max_length` leaves
nothing to train, are dropped, counted and logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from aligntune.config import sft
from aligntune.data.cache import cached_map
from aligntune.data.detect import RowReader, row_error, row_reader
from aligntune.data.examples import ChatExample, CompletionExample, Example, TextExample
from aligntune.data.fingerprint import tokenizer_fingerprint
from aligntune.data.masks import IGNORED, Ids, Span, encode_spans
from aligntune.data.sources import called, column_names, processes
from aligntune.data.template import ChatTemplate, use_template
from aligntune.errors import ConfigError, DataError, ModelError

logger = logging.getLogger(__name__)

KEPT, EMPTY, CUT = 0, 1, 2
"""Fate of a row: kept; dropped because it is empty; dropped because nothing to train is left within `max_length`."""

MADE = ("input_ids", "labels", "length", "fate", "prompt_ids", "chosen_ids", "rejected_ids")
"""Names of the columns that tokenising makes."""

TOKENS: dict[str, Any] = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")}


def tokenize_sft(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    config: sft.DatasetConfig,
    *,
    max_length: int | None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> Dataset | IterableDataset:
    """Rows with `input_ids`, `labels`, `length` and the config's `preserve_columns`.

    The tokenizer gets the config's chat template. `max_length` None cuts nothing (as `wrapped` packing wants).

    Raises:
        DataError: rows of no known format, a row that cannot be read or has an empty mask, or no row left.
        ConfigError: a mask that these rows cannot have.
    """
    reader = row_reader(rows, config)
    fallback = "alpaca" if reader.row_format.name in ("alpaca", "dolly") else "plain"
    use_template(tokenizer, config.chat_template, fallback=fallback)
    preserved = preserved_columns(rows, config.preserve_columns)
    masking = Masking(max_length, completion_only_loss, assistant_only_loss)
    tokenise = SftTokenizer(reader, tokenizer, preserved, masking=masking)
    if isinstance(rows, IterableDataset):
        return rows.map(tokenise.kept_only, batched=True, with_indices=True, remove_columns=column_names(rows))
    features = Features(TOKENS | {"fate": Value("int8")} | {name: rows.features[name] for name in preserved})
    key = {
        "what": "sft",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "reader": reader.key(),
        "masking": asdict(masking),
    }
    done = cached_map(
        rows, tokenise, key=key, features=features, num_proc=processes(config.dataset_num_proc), desc="tokenise"
    )
    reasons = {EMPTY: "empty", CUT: f"nothing to train within max_length {max_length}"}
    return drop_rows(done, reasons, called(config))


@dataclass(frozen=True)
class Masking:
    """What is trained, and where rows are cut."""

    max_length: int | None
    completion_only: bool | None = None
    assistant_only: bool = False


def preserved_columns(rows: Dataset | IterableDataset, names: Sequence[str] | None) -> list[str]:
    """The columns to keep, checked.

    Raises:
        DataError: one is not there.
        ConfigError: one has the name of a column that tokenising makes.
    """
    names = list(names or ())
    columns = column_names(rows)
    absent = [name for name in names if name not in columns]
    if absent:
        raise DataError(f"preserve_columns names {', '.join(absent)}, but the columns are: {', '.join(columns)}")
    taken = sorted(set(names) & set(MADE))
    if taken:
        raise ConfigError(f"preserve_columns: {', '.join(taken)} is a column that tokenising makes; rename it first")
    return names


def drop_rows(rows: Dataset, reasons: Mapping[int, str], dataset: str) -> Dataset:
    """Without the rows whose `fate` is not `KEPT`, and without that column; logs how many went and why.

    Raises:
        DataError: no row is left.
    """
    fates = np.asarray(rows.with_format("numpy")["fate"][:])
    kept = np.flatnonzero(fates == KEPT)
    counts = {reason: int((fates == fate).sum()) for fate, reason in reasons.items()}
    told = ", ".join(f"{count} ({reason})" for reason, count in counts.items() if count)
    if len(kept) == 0:
        raise DataError(f"{dataset}: none of the {len(rows)} rows can be trained on: {told}")
    rows = rows.remove_columns("fate")
    if len(kept) == len(fates):
        return rows
    logger.warning("%s: dropped %d of %d rows: %s", dataset, len(fates) - len(kept), len(fates), told)
    return rows.select(kept)


@dataclass
class RowTokenizer:
    """What the functions that `datasets.map` runs have in common: a reader, a tokenizer with its template, kept columns."""

    reader: RowReader
    tokenizer: PreTrainedTokenizerBase
    preserved: Sequence[str] = ()
    enable_thinking: bool | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, enable_thinking=self.enable_thinking)

    @cached_property
    def ends(self) -> RawEnds:
        return RawEnds.of(self.tokenizer)

    def error(self, error: str | DataError, row: Mapping[str, Any], index: int) -> DataError:
        """The error with its row shown."""
        return row_error(DataError(str(error)), row, index, self.reader)

    def kept(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: batch[name] for name in self.preserved}


def rows_of(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """A batch of columns as rows."""
    columns = list(batch)
    return [dict(zip(columns, values, strict=True)) for values in zip(*(batch[name] for name in columns), strict=True)]


@dataclass
class SftTokenizer(RowTokenizer):
    """Rows of language modelling -> tokens and labels."""

    masking: Masking = Masking(None)

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        rows = rows_of(batch)
        rendered = [self._render(row, index) for row, index in zip(rows, indices, strict=True)]
        encoded = encode_spans(
            self.tokenizer, [entry.text for entry in rendered], [entry.spans or [] for entry in rendered]
        )
        ids, labels, fates = [], [], []
        for row, index, entry, tokens in zip(rows, indices, rendered, encoded, strict=True):
            row_ids, row_labels, fate = self._finish(entry, tokens.ids, tokens.ranges)
            if fate == EMPTY and entry.spans is not None and entry.text:
                raise self.error("no token of this row is trained (its loss mask is empty)", row, index)
            ids.append(row_ids)
            labels.append(row_labels)
            fates.append(fate)
        lengths = [len(row) for row in ids]
        return {"input_ids": ids, "labels": labels, "length": lengths, "fate": fates, **self.kept(batch)}

    def kept_only(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """As a call, for streams: dropped rows are left out at once."""
        done = self(batch, indices)
        fates = done.pop("fate")
        return {
            name: [value for value, fate in zip(values, fates, strict=True) if fate == KEPT]
            for name, values in done.items()
        }

    def _render(self, row: Mapping[str, Any], index: int) -> Rendered:
        example = self.reader(row, index)
        try:
            return render(example, self.template if isinstance(example, ChatExample) else None, self.masking)
        except DataError as error:
            raise self.error(error, row, index) from None

    def _finish(self, entry: Rendered, ids: Ids, ranges: Sequence[Span]) -> tuple[Ids, Ids, int]:
        """Ids and labels of one row, cut to `max_length`, and its fate."""
        if entry.spans is None:
            trained = np.ones(len(ids), dtype=bool)
        else:
            trained = np.zeros(len(ids), dtype=bool)
            for first, last in ranges:
                trained[first:last] = True
        if entry.raw:
            begun = self.ends.begin(ids)
            ended = self.ends.end(begun)
            trained = np.pad(trained, (len(begun) - len(ids), 0))
            trained = np.pad(trained, (0, len(ended) - len(begun)), constant_values=True)  # the end is trained
            ids = ended
        labels = np.where(trained, ids, np.int32(IGNORED))
        labels[:1] = IGNORED
        if not entry.text or not (labels != IGNORED).any():
            return ids[:0], labels[:0], EMPTY
        limit = self.masking.max_length
        ids, labels = ids[:limit], labels[:limit]
        return ids, labels, KEPT if (labels != IGNORED).any() else CUT


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row and the character spans that are trained (None: all of it). Raw text has no template around it."""

    text: str
    spans: list[Span] | None
    raw: bool = False


def render(example: Example, template: ChatTemplate | None, masking: Masking) -> Rendered:
    """The text of an example and what of it is trained.

    Raises:
        ConfigError: a mask that this kind of example cannot have.
        DataError: a conversation that the template refuses, or without the turns that the mask asks for.
    """
    if isinstance(example, ChatExample):
        assert template is not None
        return _render_chat(example, template, masking)
    if masking.assistant_only:
        raise ConfigError("assistant_only_loss needs conversations; these rows are raw text")
    if isinstance(example, CompletionExample):
        text = example.prompt + example.completion
        if masking.completion_only is False:
            return Rendered(text, None, raw=True)
        return Rendered(text, [(len(example.prompt), len(text))], raw=True)
    assert isinstance(example, TextExample)
    if masking.completion_only:
        raise ConfigError(
            "completion_only_loss needs prompts and completions, or conversations; these rows are raw text"
        )
    return Rendered(example.text, None, raw=True)


def _render_chat(example: ChatExample, template: ChatTemplate, masking: Masking) -> Rendered:
    completion_only = masking.completion_only
    if completion_only is None:
        completion_only = example.prompt_length > 0
    if completion_only:
        since = example.prompt_length or _last_answer(example)
    else:  # without any mask only the last turn is looked at, for its end
        since = 0 if masking.assistant_only else len(example.messages) - 1
    text, turns = template.turns(example.messages, example.tools, since=since)
    if not (completion_only or masking.assistant_only):
        return Rendered(text, None)
    if not turns:
        raise DataError("the conversation has no assistant turn to train")
    if masking.assistant_only:
        return Rendered(text, [(turn.start, turn.end) for turn in turns])
    return Rendered(text, [(turns[0].start, turns[-1].end)])


def _last_answer(example: ChatExample) -> int:
    places = [place for place, message in enumerate(example.messages) if message["role"] == "assistant"]
    if not places:
        raise DataError("the conversation has no assistant turn to train")
    return places[-1]


@dataclass(frozen=True)
class RawEnds:
    """Special tokens around raw text: what the tokenizer itself puts there, and end-of-sequence."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RawEnds:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ModelError("the tokenizer has no end-of-sequence token (eos_token), so raw text cannot be ended")
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        place = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        before, after = full[:place], full[place + len(bare) :]
        return cls(tuple(before), tuple(after if eos in after else [*after, eos]))

    def begin(self, ids: Ids) -> Ids:
        """With the tokens before `ids`, unless the text has them already."""
        before = np.asarray(self.before, np.int32)
        return ids if np.array_equal(ids[: len(before)], before) else np.concatenate([before, ids])

    def end(self, ids: Ids) -> Ids:
        """With the tokens after `ids`, unless the text has them already."""
        after = np.asarray(self.after, np.int32)
        return ids if np.array_equal(ids[-len(after) :], after) else np.concatenate([ids, after])
