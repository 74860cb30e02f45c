"""Characters to tokens, held against the definition by brute force on open inputs."""

from __future__ import annotations

import numpy as np
import pytest
from chat_families import family
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aligntune.data.masks import encode_spans
from aligntune.errors import ModelError

TEXT = st.text(alphabet=st.sampled_from(list("ab .\n\té日☂️🇫🇷<|im_end|>capital ")), max_size=40)


@st.composite
def text_and_span(draw):
    text = draw(TEXT)
    start = draw(st.integers(0, len(text)))
    return text, (start, draw(st.integers(start, len(text))))


@pytest.mark.parametrize("name", ["qwen2.5", "qwen2.5-trim", "mistral"])
@settings(max_examples=150, deadline=None)
@given(case=text_and_span())
@example(case=("  ", (0, 1)))  # a token of blanks alone, which a tokenizer says begins behind them
def test_ranges_are_the_tokens_that_overlap_the_span(name, case):
    """A token's text runs from the end of the one before it (or its own start, if earlier) to its end."""
    text, (start, end) = case
    tokenizer = family(name)
    (found,) = encode_spans(tokenizer, [text], [[(start, end)]])
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert found.ids.tolist() == encoding["input_ids"]
    first, last = found.ranges[0]
    before = 0
    for token, (begin, stop) in enumerate(encoding["offset_mapping"]):
        overlaps = stop > start and min(begin, before) < end
        assert (first <= token < last) == overlaps, (token, encoding["offset_mapping"], (start, end))
        before = max(before, stop)


@settings(max_examples=100, deadline=None)
@given(left=TEXT, right=TEXT)
def test_tokens_of_a_span_after_a_special_token_decode_to_it(left, right):
    tokenizer = family("qwen2.5")
    head = f"{left}<|im_start|>"
    (found,) = encode_spans(tokenizer, [head + right], [[(len(head), len(head) + len(right))]])
    first, last = found.ranges[0]
    assert tokenizer.decode(found.ids[first:last]) == right
    assert last == len(found.ids)
    assert found.ids.dtype == np.int32


def test_slow_tokenizers_are_refused(monkeypatch):
    tokenizer = family("qwen2.5")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match="slow tokenizer"):
        encode_spans(tokenizer, ["a"], [[]])
