"""Which tokens lie in these characters? Token ids of a text, and the token ranges that cover given character spans.

The text is tokenised once, as a whole. A token that straddles the edge of a span is in it: it carries text that the model
has to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from aligntune.errors import ModelError

IGNORED = -100
"""Label of a token without a loss."""

AT_ONCE = 1 << 21
"""Characters that are tokenised at a time: the tokenizer keeps over a hundred bytes about each of their tokens."""

Ids = npt.NDArray[np.int32]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class TokenSpans:
    """`ids` [n] of a text, and for each character span the token range [first, last) that covers it."""

    ids: Ids
    ranges: list[Span]


def encode_spans(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[TokenSpans]:
    """Tokenise `texts` as they are (no special tokens are added) and find the tokens of each text's character spans.

    Raises:
        ModelError: the tokenizer is a slow one, which cannot tell the characters of a token.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer: it cannot tell which characters a token covers, so no loss mask "
            "can be made. Use the model's fast tokenizer (a tokenizer.json)."
        )
    parts = in_parts([len(text) for text in texts], AT_ONCE)
    return [row for part in parts for row in _encode(tokenizer, texts[part], spans[part])]


def in_parts(sizes: Sequence[int], limit: int) -> Iterator[slice]:
    """Stretches of items whose `sizes` add up to at most `limit`; an item above it is alone."""
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and total + size > limit:
            yield slice(start, place)
            start, total = place, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[TokenSpans]:
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    encodings = encoded.encodings
    assert encodings is not None
    return [
        TokenSpans(np.asarray(ids, dtype=np.int32), [token_range(encoding, span, len(text)) for span in wanted])
        for ids, encoding, text, wanted in zip(encoded["input_ids"], encodings, texts, spans, strict=True)
    ]


def token_range(encoding: Encoding, span: Span, length: int) -> Span:
    """Tokens [first, last) that cover the characters `span` of a text of `length` characters."""
    start, end = span
    first = _first_ending_after(encoding, start, length)
    last = _first_ending_after(encoding, end, length)
    if last < len(encoding) and _begin(encoding, last) < end:
        last += 1
    return first, last


def _first_ending_after(encoding: Encoding, place: int, length: int) -> int:
    """The first token that ends after character `place`.

    Some tokenizers leave blanks out of a token's characters, so the search goes on to the next character that has a token,
    and from there back over tokens that also end later (several tokens may share one character).
    """
    found = (encoding.char_to_token(character) for character in range(place, length))
    token = next((token for token in found if token is not None), len(encoding))
    while token > 0 and _chars(encoding, token - 1)[1] > place:
        token -= 1
    return token


def _begin(encoding: Encoding, token: int) -> int:
    """Where the text of `token` begins, blanks that the tokenizer left out included."""
    return min(_chars(encoding, token)[0], _chars(encoding, token - 1)[1]) if token else 0


def _chars(encoding: Encoding, token: int) -> Span:
    return encoding.token_to_chars(token) or (0, 0)
