"""Which class does a text, or each of its words, belong to? Label sets inferred from data, and rows with integer labels.

Text classification: `input_ids`, `labels` (one integer), `length`. Token classification: `labels` has one integer for the
first sub-token of each word and -100 elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from aligntune.config import sft
from aligntune.data.cache import cached_map
from aligntune.data.detect import RowReader, row_error, row_reader
from aligntune.data.examples import LabelledExample, TaggedExample
from aligntune.data.fingerprint import tokenizer_fingerprint
from aligntune.data.masks import IGNORED
from aligntune.data.sources import called, processes
from aligntune.data.tokenize import EMPTY, KEPT, drop_rows, preserved_columns, rows_of
from aligntune.errors import DataError, ModelError


@dataclass(frozen=True)
class LabelSet:
    """The classes of a task. `names[i]` is the name of class i; `ids` maps a label as the dataset writes it to i."""

    names: tuple[str, ...]
    ids: Mapping[Any, int]

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def id_of(self, label: Any) -> int:
        """The class of a label. Raises `DataError` when it is none of them."""
        place = self.ids.get(_plain(label))
        if place is None:
            known = ", ".join(map(repr, list(self.ids)[: min(len(self.names), 20)]))
            raise DataError(f"label {label!r} is not one of the {len(self.names)} classes: {known}")
        return place


def find_labels(
    rows: Dataset | IterableDataset, config: sft.DatasetConfig, *, num_labels: int | None = None
) -> LabelSet:
    """The classes in `rows` (the training rows: evaluation must use the same set).

    A `ClassLabel` column gives its own names. Text labels are sorted by name (with "O" first for tags). Integers that fit
    0 .. n-1 keep their value; others are numbered in order. `num_labels`, when given, must hold them all.

    Raises:
        DataError: labels missing or empty, fractional, mixed, out of range, or all the same.
    """
    return find_shared_labels([(rows, config)], num_labels=num_labels)


def find_shared_labels(
    parts: Sequence[tuple[Dataset | IterableDataset, sft.DatasetConfig]],
    *,
    num_labels: int | None = None,
    at_least: int = 2,
) -> LabelSet:
    """The classes of several datasets together, as `find_labels`; `at_least` so many (one, of rows to evaluate).

    Raises:
        DataError: also when the datasets' `ClassLabel` columns have different names.
    """
    readers = [(rows, row_reader(rows, config)) for rows, config in parts]
    columns = [_label_column(reader) for _, reader in readers]
    named = [_class_names(rows, column) for (rows, _), column in zip(readers, columns, strict=True)]
    if any(names is not None for names in named):
        return _named_labels(named, columns[0], num_labels)
    seen = {label for rows, reader in readers for label in _distinct(rows, reader)}
    return _numbered(seen, columns[0], num_labels, at_least)


def _label_column(reader: RowReader) -> str:
    return reader.columns["tags" if reader.row_format.kind == "tagging" else "label"]


def _named_labels(named: Sequence[list[str] | None], column: str, num_labels: int | None) -> LabelSet:
    """The classes that `ClassLabel` columns name; all datasets of a mixture must name the same."""
    first = named[0]
    if first is None or any(names != first for names in named):
        raise DataError(f"the datasets do not name the same classes: {'; '.join(map(str, named))}")
    _fits(len(first), num_labels, column)
    spare = [f"LABEL_{place}" for place in range(len(first), num_labels or 0)]
    return LabelSet((*first, *spare), {place: place for place in range(len(first))})


def labels_for(rows: Dataset | IterableDataset, config: sft.DatasetConfig, labels: LabelSet) -> LabelSet:
    """`labels`, the classes of other rows, as `rows` write them: by name too, and by name alone where a `ClassLabel` column of
    `rows` has names of its own, which may be in another order."""
    named = _class_names(rows, _label_column(row_reader(rows, config)))
    places = labels.label2id
    if named is None:
        return LabelSet(labels.names, {**labels.ids, **places})
    shared = {number: places[name] for number, name in enumerate(named) if name in places}
    return LabelSet(labels.names, shared) if shared else labels


def labels_of_model(names: Sequence[str], found: LabelSet) -> LabelSet:
    """The classes of a trained classifier, reached by a dataset's labels: by their names, or, without names, by number.

    Raises:
        DataError: a label that the classifier does not know.
    """
    places = {name: place for place, name in enumerate(names)}
    called = {label: found.names[place] for label, place in found.ids.items()}
    unknown = sorted(name for name in called.values() if name not in places)
    if not unknown:
        return LabelSet(tuple(names), {label: places[name] for label, name in called.items()})
    if all(isinstance(label, int) and label < len(names) and name == str(label) for label, name in called.items()):
        return LabelSet(tuple(names), {label: label for label in called})
    raise DataError(
        f"the labels {', '.join(map(repr, unknown[:20]))} are not among the model's classes: {', '.join(names)}"
    )


def _distinct(rows: Dataset | IterableDataset, reader: RowReader) -> set[Any]:
    """The labels of all rows, checked: from the column as Arrow keeps it; row by row where one is wrong, for the error."""
    column = _label_column(reader)
    feature = rows.features[column] if rows.features else None
    listed = isinstance(feature, List)
    single = feature.feature if isinstance(feature, List) else feature
    if isinstance(rows, Dataset) and isinstance(single, Value):
        seen: set[Any] = set()
        for batch in rows.select_columns([column]).with_format("arrow").iter(100_000):
            values = pc.list_flatten(batch[column]) if listed else batch[column]
            seen.update(map(_plain, pc.unique(values).to_pylist()))
        if all(map(_is_label, seen)):
            return seen
    return {label for index, row in enumerate(rows) for label in _values(reader, row, index)}


def _is_label(plain: Any) -> bool:
    return isinstance(plain, str | int) and plain != ""


def _values(reader: RowReader, row: Mapping[str, Any], index: int) -> Iterable[Any]:
    """The labels of one row, checked one by one."""
    example = reader(row, index)
    labels = example.tags if isinstance(example, TaggedExample) else [example.label]  # type: ignore[union-attr]
    for label in labels:
        plain = _plain(label)
        if not _is_label(plain):
            raise row_error(
                DataError(f"a label should be text or a whole number, got {label!r}; drop rows without a label"),
                row,
                index,
                reader,
            )
        yield plain


def _plain(label: Any) -> Any:
    """The label as a dict key: whole floats as ints, bools as text, blanks around text removed."""
    if isinstance(label, bool | np.bool_):
        return str(bool(label))
    if isinstance(label, float) and label.is_integer():
        return int(label)
    return label.strip() if isinstance(label, str) else label


def _class_names(rows: Dataset | IterableDataset, column: str) -> list[str] | None:
    feature = rows.features[column] if rows.features else None
    feature = feature.feature if isinstance(feature, List) else feature
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _numbered(seen: set[Any], column: str, num_labels: int | None, at_least: int) -> LabelSet:
    if len({type(label) for label in seen}) > 1:
        raise DataError(f"column {column!r} mixes text and numbers as labels: {sorted(map(str, seen))[:20]}")
    if len(seen) < at_least:
        only = next(iter(seen), None)
        raise DataError(f"column {column!r} has one class only ({only!r}); a classifier needs at least two")
    if all(isinstance(label, str) for label in seen):
        names = sorted(seen, key=lambda name: (name != "O", name))
        _fits(len(names), num_labels, column)
        spare = [f"LABEL_{place}" for place in range(len(names), num_labels or 0)]
        return LabelSet((*names, *spare), {name: place for place, name in enumerate(names)})
    return _numbers(sorted(seen), column, num_labels)


def _numbers(values: list[int], column: str, num_labels: int | None) -> LabelSet:
    count = num_labels or len(values)
    if values[0] >= 0 and values[-1] < count:
        return LabelSet(tuple(map(str, range(count))), {place: place for place in range(count)})
    if num_labels is not None or values[0] < 0:
        bad = [value for value in values if not 0 <= value < (num_labels or value + 1)]
        limit = f"0 .. {num_labels - 1} (num_labels {num_labels})" if num_labels else "0 and above"
        hint = "; -1 often marks rows without a label" if -1 in bad else ""
        raise DataError(f"column {column!r} has labels outside {limit}: {bad[:10]}{hint}")
    return LabelSet(tuple(map(str, values)), {value: place for place, value in enumerate(values)})


def _fits(found: int, num_labels: int | None, column: str) -> None:
    if num_labels is not None and found > num_labels:
        raise DataError(f"column {column!r} has {found} classes, but num_labels is {num_labels}")


def tokenize_classes(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: sft.DatasetConfig,
    labels: LabelSet,
    *,
    max_length: int | None,
) -> Dataset:
    """Rows of text classification. Long texts are cut at the end; empty ones are dropped, counted and logged.

    Raises:
        DataError: a label that is not in `labels`, with its row.
    """
    reader = row_reader(rows, config)

    def tokenise(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        texts, classes = [], []
        for row, index in zip(rows_of(batch), indices, strict=True):
            example = reader(row, index)
            assert isinstance(example, LabelledExample)
            texts.append(example.text)
            classes.append(_checked_id(labels, example.label, row, index, reader))
        ids = _encode(tokenizer, texts, max_length)["input_ids"]
        fates = [KEPT if text.strip() else EMPTY for text in texts]
        kept = {name: batch[name] for name in preserved}
        return {"input_ids": ids, "labels": classes, "length": list(map(len, ids)), "fate": fates, **kept}

    preserved = preserved_columns(rows, config.preserve_columns)
    return _run(rows, tokenise, tokenizer, config, labels, max_length, preserved, reader, Value("int32"))


def tokenize_tags(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: sft.DatasetConfig,
    labels: LabelSet,
    *,
    max_length: int | None,
) -> Dataset:
    """Rows of token classification: the words joined by blanks, each word's label on its first sub-token.

    Rows without words, and rows of which no word is left within `max_length`, are dropped, counted and logged.

    Raises:
        DataError: words and tags of different number, or a tag that is not in `labels`, with the row.
        ModelError: a slow tokenizer.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"token classification needs a fast tokenizer; {type(tokenizer).__name__} is a slow one")
    reader = row_reader(rows, config)

    def tokenise(batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        words, classes = [], []
        for row, index in zip(rows_of(batch), indices, strict=True):
            example = reader(row, index)
            assert isinstance(example, TaggedExample)
            words.append(example.tokens)
            classes.append([_checked_id(labels, tag, row, index, reader) for tag in example.tags])
        encoded = _encode(tokenizer, [" ".join(tokens) for tokens in words], max_length, offsets=True)
        aligned = [
            align_tags(offsets, tokens, tags)
            for offsets, tokens, tags in zip(encoded["offset_mapping"], words, classes, strict=True)
        ]
        ids = encoded["input_ids"]
        fates = [KEPT if (row != IGNORED).any() else EMPTY for row in aligned]
        kept = {name: batch[name] for name in preserved}
        return {"input_ids": ids, "labels": aligned, "length": list(map(len, ids)), "fate": fates, **kept}

    preserved = preserved_columns(rows, config.preserve_columns)
    return _run(rows, tokenise, tokenizer, config, labels, max_length, preserved, reader, List(Value("int32")))


def align_tags(offsets: Sequence[tuple[int, int]], words: Sequence[str], tags: Sequence[int]) -> Any:
    """One label a token, [n]: each word's on the first token that reaches into it, -100 elsewhere.

    `offsets` are the tokens' characters in the words joined by single blanks; (0, 0) for special tokens. A word without any
    token of its own (a control character that the tokenizer drops) gives none.
    """
    labels = np.full(len(offsets), IGNORED, dtype=np.int32)
    if not len(offsets):
        return labels
    ends = np.maximum.accumulate(np.asarray(offsets)[:, 1])
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    tokens = np.searchsorted(ends, starts[:-1], side="right")
    for word, token in enumerate(tokens):
        if token < len(offsets) and offsets[token][0] < starts[word] + len(words[word]):
            labels[token] = tags[word]
    return labels


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int | None, offsets: bool = False
) -> Mapping[str, Any]:
    return tokenizer(
        texts, truncation=max_length is not None, max_length=max_length, return_offsets_mapping=offsets,
        return_attention_mask=False, return_token_type_ids=False, verbose=False,
    )  # fmt: skip


def _checked_id(labels: LabelSet, label: Any, row: Mapping[str, Any], index: int, reader: RowReader) -> int:
    try:
        return labels.id_of(label)
    except DataError as error:
        raise row_error(error, row, index, reader) from None


def _run(
    rows: Dataset, tokenise: Any, tokenizer: PreTrainedTokenizerBase, config: sft.DatasetConfig, labels: LabelSet,
    max_length: int | None, preserved: list[str], reader: RowReader, label_feature: Any,
) -> Dataset:  # fmt: skip
    made = {"input_ids": List(Value("int32")), "labels": label_feature, "length": Value("int32"), "fate": Value("int8")}
    features = Features(made | {name: rows.features[name] for name in preserved})
    key = {
        "what": "labels", "tokenizer": tokenizer_fingerprint(tokenizer), "reader": reader.key(), "max_length": max_length,
        "labels": [labels.names, sorted(map(repr, labels.ids.items()))],
    }  # fmt: skip
    done = cached_map(
        rows, tokenise, key=key, features=features, num_proc=processes(config.dataset_num_proc), desc="tokenise"
    )
    return drop_rows(done, {EMPTY: "empty, or no word left within max_length"}, called(config))
