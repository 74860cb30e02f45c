"""Rows of supervised fine-tuning as tokens: raw text, completions, instructions, cuts and drops, cache, streams."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from chat_families import family
from datasets import Dataset, load_dataset

from aligntune.config.sft import DatasetConfig
from aligntune.data import cache
from aligntune.data.masks import IGNORED
from aligntune.data.tokenize import RawEnds, tokenize_sft
from aligntune.errors import ConfigError, DataError, ModelError

CONFIG = DatasetConfig(name="x")


def tokens(rows, tokenizer, config=CONFIG, max_length=None, **options):
    return tokenize_sft(Dataset.from_list(rows), tokenizer, config, max_length=max_length, **options)


def trained(tokenizer, row):
    return tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"]) if label != IGNORED])


def text_of(tokenizer, row):
    return tokenizer.decode(row["input_ids"])


class TestRawText:
    def test_special_tokens_of_the_tokenizer_and_an_end(self):
        tokenizer = family("mistral")
        (row,) = tokens([{"text": "hello world"}], tokenizer)
        assert text_of(tokenizer, row) == "<s>hello world</s>"
        assert trained(tokenizer, row) == "hello world</s>"
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])

    def test_without_a_beginning_token_the_first_token_of_the_text_is_not_trained(self):
        tokenizer = family("qwen2.5")
        (row,) = tokens([{"text": "hello world"}], tokenizer)
        assert text_of(tokenizer, row) == "hello world<|im_end|>"
        assert row["labels"] == [IGNORED, *row["input_ids"][1:]]

    def test_no_second_beginning_or_end(self):
        tokenizer = family("mistral")
        (row,) = tokens([{"text": "<s>hello</s>"}], tokenizer)
        assert text_of(tokenizer, row) == "<s>hello</s>"

    def test_a_tokenizer_without_an_end_is_refused(self):
        tokenizer = family("qwen2.5")
        tokenizer.eos_token = None
        with pytest.raises(ModelError, match="no end-of-sequence token"):
            RawEnds.of(tokenizer)

    def test_empty_texts_are_dropped_and_counted(self, caplog):
        with caplog.at_level(logging.WARNING):
            rows = tokens([{"text": "hello"}, {"text": ""}, {"text": None}], family("mistral"))
        assert len(rows) == 1
        assert "dropped 2 of 3 rows: 2 (empty)" in caplog.text

    def test_only_empty_texts(self):
        with pytest.raises(DataError, match=r"none of the 2 rows can be trained on: 2 \(empty\)"):
            tokens([{"text": ""}, {"text": ""}], family("mistral"))


class TestCompletions:
    ROW = {"prompt": "The capital of France is", "completion": " Paris."}

    def test_completion_is_trained_unless_told_otherwise(self):
        tokenizer = family("mistral")
        (row,) = tokens([self.ROW], tokenizer)
        assert text_of(tokenizer, row) == "<s>The capital of France is Paris.</s>"
        assert trained(tokenizer, row) == " Paris.</s>"
        (row,) = tokens([self.ROW], tokenizer, completion_only_loss=False)
        assert trained(tokenizer, row) == "The capital of France is Paris.</s>"

    def test_conversational_completions_train_what_follows_the_prompt(self):
        tokenizer = family("qwen2.5")
        chat = {
            "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "So?"}],
            "completion": [
                {"role": "assistant", "content": "So."}, {"role": "user", "content": "Go on."}, {"role": "assistant", "content": "On."},
            ],
        }  # fmt: skip
        (row,) = tokens([chat], tokenizer)
        assert trained(tokenizer, row) == (
            "So.<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\nOn.<|im_end|>"
        )
        (row,) = tokens([chat], tokenizer, assistant_only_loss=True)
        assert trained(tokenizer, row) == "So.<|im_end|>On.<|im_end|>"
        (row,) = tokens([chat], tokenizer, assistant_only_loss=True, completion_only_loss=False)
        assert trained(tokenizer, row) == "Hello.<|im_end|>So.<|im_end|>On.<|im_end|>"

    def test_instructions_go_through_the_template(self):
        tokenizer = family("llama3")
        (row,) = tokens([{"instruction": "Add.", "input": "1 2", "output": "3"}], tokenizer)
        assert text_of(tokenizer, row) == (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nAdd.\n\n1 2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n3<|eot_id|>"
        )
        assert trained(tokenizer, row) == "3<|eot_id|>"

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"instruction": "Hi", "output": "Yes."}, "### Instruction:\nHi\n\n### Response:\nYes.</s>"),
            ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}, "User:\nHi\n\nAssistant:\nYes.</s>"),
        ],
    )  # fmt: skip
    def test_a_tokenizer_without_a_template_gets_one_that_fits_the_rows(self, row, expected):
        tokenizer = family("mistral")
        tokenizer.chat_template = None
        (row,) = tokens([row], tokenizer)
        assert text_of(tokenizer, row).endswith(expected + "\n\n")
        assert tokenizer.chat_template is not None

    def test_config_template_is_given_to_the_tokenizer(self):
        tokenizer = family("mistral")
        row = {"instruction": "Hi", "output": "Yes."}
        (row,) = tokens([row], tokenizer, DatasetConfig(name="x", chat_template="plain"))
        assert text_of(tokenizer, row) == "<s>User:\nHi\n\nAssistant:\nYes.</s>\n\n"


class TestRefusals:
    def test_masks_that_raw_text_cannot_have(self):
        with pytest.raises(ConfigError, match="completion_only_loss needs prompts and completions"):
            tokens([{"text": "a b c"}], family("mistral"), completion_only_loss=True)
        with pytest.raises(ConfigError, match="assistant_only_loss needs conversations"):
            tokens([{"text": "a b c"}], family("mistral"), assistant_only_loss=True)

    def test_an_empty_mask_shows_the_row(self):
        rows = [{"messages": [{"role": "user", "content": "Hi"}]}]
        for option in ("completion_only_loss", "assistant_only_loss"):
            with pytest.raises(DataError, match=r"(?s)row 0 \(messages\): .*no assistant turn.*'content': 'Hi'"):
                tokens(rows, family("qwen2.5"), **{option: True})

    def test_preserved_columns_must_be_there_and_keep_their_names(self):
        with pytest.raises(DataError, match="preserve_columns names id, but the columns are: text"):
            tokens([{"text": "a"}], family("mistral"), DatasetConfig(name="x", preserve_columns=["id"]))
        with pytest.raises(ConfigError, match="labels is a column that tokenising makes"):
            tokens(
                [{"text": "a", "labels": 1}], family("mistral"), DatasetConfig(name="x", preserve_columns=["labels"])
            )


class TestCuts:
    def test_rows_are_cut_at_the_end(self):
        tokenizer = family("mistral")
        whole = tokens([{"text": "hello world thank you"}], tokenizer)[0]
        cut = tokens([{"text": "hello world thank you"}], tokenizer, max_length=3)[0]
        assert cut["input_ids"] == whole["input_ids"][:3]
        assert cut["labels"] == whole["labels"][:3]
        assert cut["length"] == 3

    def test_rows_of_which_nothing_trained_is_left_are_dropped_and_counted(self, caplog):
        tokenizer = family("llama3")
        rows = [{"instruction": "Hi " * size, "output": "Yes."} for size in (1, 100)]
        with caplog.at_level(logging.WARNING):
            left = tokens(rows, tokenizer, max_length=50)
        assert len(left) == 1
        assert "dropped 1 of 2 rows: 1 (nothing to train within max_length 50)" in caplog.text
        with pytest.raises(DataError, match="none of the 1 rows"):
            tokens(rows[1:], tokenizer, max_length=50)


def test_preserved_columns_stay_beside_the_tokens():
    rows = tokens(
        [{"text": "a b", "id": "7", "x": 1}], family("mistral"), DatasetConfig(name="x", preserve_columns=["id"])
    )
    assert rows.column_names == ["input_ids", "labels", "length", "id"]
    assert rows[0]["id"] == "7"


def test_processes_give_the_same_rows_in_the_same_order():
    rows = [{"text": f"number {number}"} for number in range(50)]
    one = tokens(rows, family("mistral"))
    two = tokens(rows, family("mistral"), DatasetConfig(name="x", dataset_num_proc=2), max_length=1000)
    assert two["input_ids"][:] == one["input_ids"][:]


def test_errors_of_other_processes_keep_their_class_and_row():
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}] * 5
    chats.append({"messages": [{"role": "user", "content": "No answer"}]})
    config = DatasetConfig(name="x", dataset_num_proc=2)
    with pytest.raises(DataError, match=r"(?s)row 5 \(messages\): .*no assistant turn.*No answer"):
        tokens(chats, family("qwen2.5"), config, assistant_only_loss=True)


class TestCache:
    ROWS = [{"text": "hello"}, {"text": "world"}]

    @pytest.fixture
    def made(self, monkeypatch):
        """How many rows were tokenised (not read from the cache) since the last look."""
        calls = []
        original = Dataset.map

        def counting(rows, function, **options):
            def call(batch, indices):
                calls.append(len(indices))
                return function(batch, indices)

            return original(rows, call, **options)

        monkeypatch.setattr(Dataset, "map", counting)

        def since():
            total = sum(calls)
            calls.clear()
            return total

        return since

    def test_the_same_content_is_tokenised_once_wherever_it_lies(self, made, tmp_path):
        first = tokens(self.ROWS, family("mistral"))
        assert made() == 2
        Dataset.from_list(self.ROWS).to_json(tmp_path / "copy.jsonl")
        rows = load_dataset("json", data_files=str(tmp_path / "copy.jsonl"), split="train")
        again = tokenize_sft(rows, family("mistral"), DatasetConfig(name="another"), max_length=None)
        assert made() == 0
        assert again[:] == first[:]

    @pytest.mark.parametrize("change", ["rows", "max_length", "template", "system_prompt", "mask", "tokenizer"])
    def test_any_change_is_tokenised_anew(self, made, change):
        chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}]
        tokens(chat, family("qwen2.5"), max_length=100)
        made()
        tokenizer, config, options = family("qwen2.5"), CONFIG, {"max_length": 100}
        if change == "rows":
            chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]}]
        elif change == "max_length":
            options["max_length"] = 99
        elif change == "template":
            config = DatasetConfig(name="x", chat_template="chatml")
        elif change == "system_prompt":
            config = DatasetConfig(name="x", system_prompt="Be brief.")
        elif change == "mask":
            options["assistant_only_loss"] = True
        else:
            tokenizer.add_tokens(["Yes."])
        tokens(chat, tokenizer, config, **options)
        assert made() == 1

    def test_nothing_is_kept_when_caching_is_off(self, made, monkeypatch):
        monkeypatch.setattr("datasets.is_caching_enabled", lambda: False)
        for _ in range(2):
            tokens(self.ROWS, family("mistral"))
            assert made() == 2
        assert not list(cache.cache_folder().glob("*.arrow"))


class TestStreams:
    def test_same_rows_as_a_dataset(self):
        rows = Dataset.from_list([{"text": "hello", "id": 1}, {"text": "", "id": 2}, {"text": "world", "id": 3}])
        config = DatasetConfig(name="x", preserve_columns=["id"])
        whole = tokenize_sft(rows, family("mistral"), config, max_length=3)
        stream = tokenize_sft(rows.to_iterable_dataset(), family("mistral"), config, max_length=3)
        assert [{name: np.asarray(value).tolist() for name, value in row.items()} for row in stream] == list(whole)
