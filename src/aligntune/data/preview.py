"""What will be trained? Tokens of prepared rows as text, each with whether the loss counts it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from aligntune.data.masks import IGNORED

if TYPE_CHECKING:
    from rich.text import Text

Token = tuple[str, bool]
VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "⇥\t"})
"""How blanks that end a line or jump are shown; spaces at the end of a token become `·` as well."""


def preview(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, count: int = 1) -> list[list[Token]]:
    """For each of the first `count` rows of `input_ids` and `labels`: (text, trained) for each token.

    A character that several tokens share appears once, with the last of them; it is trained when that one is.
    """
    return [row_tokens(row["input_ids"], row["labels"], tokenizer) for row in islice(rows, count)]


def row_tokens(ids: Iterable[int], labels: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[Token]:
    """(text, trained) for each token of one row. The texts joined are the row's text."""
    tokens: list[Token] = []
    pending: list[int] = []
    anchor: list[int] = []  # decoded before the token, for tokenizers that strip blanks at the start of a text
    for token, label in zip(ids, labels, strict=True):
        pending.append(int(token))
        text = _decode(tokenizer, [*anchor, *pending]).removeprefix(_decode(tokenizer, anchor))
        if text.endswith("\ufffd") and len(pending) < 8:
            continue
        tokens.append((text, int(label) != IGNORED))
        anchor, pending = ([] if text.endswith("\ufffd") else pending), []
    if pending:
        tokens.append((_decode(tokenizer, pending), False))
    return tokens


def plain(tokens: Iterable[Token]) -> str:
    """The row as text, trained stretches in [[double brackets]]."""
    pieces = []
    for trained, group in groupby(tokens, key=lambda token: token[1]):
        text = "".join(text for text, _ in group)
        pieces.append(f"[[{text}]]" if trained else text)
    return "".join(pieces)


def coloured(tokens: Iterable[Token]) -> Text:
    """The row for a terminal: trained tokens green on alternating shades, so that their edges show; the rest dim."""
    from rich.text import Text

    text = Text()
    for place, (piece, trained) in enumerate(tokens):
        shown = piece.translate(VISIBLE)
        shown = shown[: len(shown.rstrip(" "))] + "·" * (len(shown) - len(shown.rstrip(" ")))
        text.append(shown, style=("black on green" if place % 2 else "black on bright_green") if trained else "dim")
    return text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
