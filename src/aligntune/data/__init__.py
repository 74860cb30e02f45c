"""Which rows, which tokens, which of them are trained?

rows = load_rows(config, seed=42)                         # sources: files, folders, hub
tokens = tokenize_sft(rows, tokenizer, config, max_length=2048)
packed = pack(tokens, 2048)                               # or not
batch = PackedCollator()(list(packed)[:8])
"""

from aligntune.data import environments  # noqa: F401  (registers its scheme)
from aligntune.data.collate import PackedCollator, PackedOrPaddedCollator, PaddedCollator
from aligntune.data.detect import RowReader, row_reader
from aligntune.data.fingerprint import rows_fingerprint, tokenizer_fingerprint
from aligntune.data.formats import row_format
from aligntune.data.labels import LabelSet, find_labels, tokenize_classes, tokenize_tags
from aligntune.data.mix import mix, mix_order
from aligntune.data.pack import pack
from aligntune.data.pairs import asked_of, tokenize_pairs, tokenize_prompts
from aligntune.data.preview import coloured, plain, preview
from aligntune.data.sources import load_rows, row_source
from aligntune.data.template import ChatTemplate, find_template, shipped_templates, use_template
from aligntune.data.tokenize import tokenize_sft

__all__ = [
    "ChatTemplate",
    "LabelSet",
    "PackedCollator",
    "PackedOrPaddedCollator",
    "PaddedCollator",
    "RowReader",
    "asked_of",
    "coloured",
    "find_labels",
    "find_template",
    "load_rows",
    "mix",
    "mix_order",
    "pack",
    "plain",
    "preview",
    "row_format",
    "row_reader",
    "row_source",
    "rows_fingerprint",
    "shipped_templates",
    "tokenize_classes",
    "tokenize_pairs",
    "tokenize_prompts",
    "tokenize_sft",
    "tokenize_tags",
    "tokenizer_fingerprint",
    "use_template",
]
