"""Are these the same rows, the same tokenizer? Fingerprints of content, for provenance and for caches.

Two datasets with the same columns, types and values in the same order have the same fingerprint, wherever they came from.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

BATCH = 10_000


def rows_fingerprint(rows: Dataset) -> str:
    """32 hex digits over the columns, their types and all values of `rows`."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(rows.features.to_dict()).encode())
    for start in range(0, len(rows), BATCH):
        _add(digest, _stretch(rows, start).replace_schema_metadata(None))
    return digest.hexdigest()


def _stretch(rows: Dataset, start: int) -> pa.Table:
    """`BATCH` rows from `start` on. Those of a selection are taken together, where `datasets` gathers them one by one."""
    if rows._indices is None:
        return rows.with_format("arrow")[start : start + BATCH]
    places = rows._indices.column(0).slice(start, BATCH).to_numpy()
    distinct, back = np.unique(places, return_inverse=True)  # in ascending order: Arrow jumps slowly between chunks
    first = int(distinct[0])
    around = rows.data.fast_slice(first, int(distinct[-1]) - first + 1)
    if around.column(0).num_chunks > BATCH // 4:  # so many that looking into each of them takes longer
        return rows.with_format("arrow")[start : start + BATCH]
    return around.take(pa.array(distinct - first)).combine_chunks().take(pa.array(back))


def _add(digest: Any, table: pa.Table) -> None:
    """Add a table's values in Arrow's stream form, which does not depend on chunks, offsets or where it lay in memory."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    digest.update(sink.getvalue())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits over all that decides which tokens a tokenizer makes: its model, added tokens and chat template."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # left behind by the last call
            model.pop(state, None)
    else:
        model = tokenizer.get_vocab()
    parts = [type(tokenizer).__name__, model, tokenizer.special_tokens_map, tokenizer.chat_template]
    return fingerprint(parts)


def fingerprint(value: Any) -> str:
    """32 hex digits over a value made of dicts, lists and plain values (others by their `repr`)."""
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
