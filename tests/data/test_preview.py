"""What the preview shows, and fingerprints of content."""

from __future__ import annotations

import numpy as np
import pytest
from chat_families import family
from datasets import Dataset, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.config.sft import DatasetConfig
from aligntune.data.fingerprint import rows_fingerprint, tokenizer_fingerprint
from aligntune.data.preview import coloured, plain, preview, row_tokens
from aligntune.data.tokenize import tokenize_sft


def row_for(name, text):
    chat = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": text}]}
    tokenizer = family(name)
    return tokenize_sft(Dataset.from_list([chat]), tokenizer, DatasetConfig(name="x"), max_length=None), tokenizer


def test_plain_marks_what_is_trained():
    rows, tokenizer = row_for("qwen3", "So ☂️.")
    assert plain(preview(rows, tokenizer)[0]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[<think>\n\n</think>\n\nSo ☂️.<|im_end|>]]\n"
    )


def test_coloured_shows_blanks_and_styles():
    rows, tokenizer = row_for("llama3", "a\nb")
    text = coloured(preview(rows, tokenizer)[0])
    assert text.plain.endswith("assistant<|end_header_id|>⏎\n⏎\na⏎\nb<|eot_id|>")
    styles = [str(span.style) for span in text.spans]
    assert "green" in styles[-1]
    assert styles[0] == "dim"


@pytest.mark.parametrize("name", ["qwen2.5", "mistral"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(list("ab \n☂é日")), max_size=20))
def test_pieces_joined_are_the_text(name, text):
    tokenizer = family(name)
    ids = tokenizer(text)["input_ids"]
    assert "".join(piece for piece, _ in row_tokens(ids, ids, tokenizer)) == tokenizer.decode(ids)


class TestFingerprints:
    ROWS = [{"a": n, "b": str(n) * (n % 7), "c": [n] * (n % 3)} for n in range(200)]

    def test_content_decides_not_place_or_chunks(self, tmp_path):
        whole = Dataset.from_list(self.ROWS)
        whole.save_to_disk(tmp_path / "d", num_shards=3)
        reversed_twice = whole.select(range(199, -1, -1)).select(range(199, -1, -1))
        expected = rows_fingerprint(whole)
        assert len(expected) == 32
        assert rows_fingerprint(load_from_disk(str(tmp_path / "d"))) == expected
        assert rows_fingerprint(reversed_twice) == expected
        assert (
            rows_fingerprint(Dataset.from_list([{"a": -1, "b": "", "c": []}, *self.ROWS]).select(range(1, 201)))
            == expected
        )

    @pytest.mark.parametrize("change", ["value", "order", "column", "type"])
    def test_any_change_shows(self, change):
        rows = Dataset.from_list(self.ROWS)
        changed = {
            "value": lambda: Dataset.from_list([*self.ROWS[:-1], {**self.ROWS[-1], "b": "x"}]),
            "order": lambda: rows.select([1, 0, *range(2, 200)]),
            "column": lambda: rows.rename_column("a", "z"),
            "type": lambda: rows.cast_column("a", rows.features["a"].__class__("int32")),
        }[change]()
        assert rows_fingerprint(changed) != rows_fingerprint(rows)

    def test_tokenizers(self):
        one, two = family("qwen2.5"), family("qwen2.5")
        two("some text", truncation=True, max_length=3)  # what a call leaves behind is no part of the content
        assert tokenizer_fingerprint(one) == tokenizer_fingerprint(two)
        two.chat_template += " "
        assert tokenizer_fingerprint(one) != tokenizer_fingerprint(two)
        assert tokenizer_fingerprint(family("llama3")) != tokenizer_fingerprint(one)


def test_preview_reads_arrays_too():
    tokenizer = family("qwen2.5")
    ids = np.array(tokenizer("hello")["input_ids"])
    assert "".join(text for text, _ in row_tokens(ids, ids, tokenizer)) == "hello"


def test_rows_have_one_fingerprint_however_they_were_chosen():
    whole = Dataset.from_dict({"a": [[at] * (at % 3) for at in range(50)], "b": [f"t{at}" for at in range(50)]})
    for places in ([3, 4, 5, 9], [40, 2, 2, 17], [0, 49]):
        alone = Dataset.from_list([whole[at] for at in places], features=whole.features)
        joined = concatenate_datasets([whole, whole]).select([place + 50 * (place % 2) for place in places])
        assert rows_fingerprint(whole.select(places)) == rows_fingerprint(joined) == rows_fingerprint(alone)
