"""Preference pairs and prompts as tokens: what is shared, what is cut, what is dropped."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
from chat_families import family
from datasets import Dataset

from aligntune.config.rl import DatasetConfig
from aligntune.data.pairs import Budget, asked_of, tokenize_pairs, tokenize_prompts
from aligntune.data.template import find_template
from aligntune.errors import DataError

PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}
TEXT = DatasetConfig(name="x", task_type="text")
CHAT = DatasetConfig(name="x")


def pairs(rows, tokenizer, config=CHAT, max_length=None, **options):
    return tokenize_pairs(Dataset.from_list(rows), tokenizer, config, max_length=max_length, **options)


def prompts(rows, tokenizer, config=CHAT, max_prompt_length=None, **options):
    return tokenize_prompts(Dataset.from_list(rows), tokenizer, config, max_prompt_length=max_prompt_length, **options)


class TestPairs:
    def test_conversations(self):
        tokenizer = family("llama3")
        (row,) = pairs([PAIR], tokenizer)
        start = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        assert tokenizer.decode(row["prompt_ids"]) == start
        assert tokenizer.decode(row["chosen_ids"]) == "Hello.<|eot_id|>"
        assert tokenizer.decode(row["rejected_ids"]) == "Go away.<|eot_id|>"
        assert row["length"] == len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    def test_raw_text_is_joined_and_ended(self):
        tokenizer = family("mistral")
        (row,) = pairs([{**PAIR, "chosen": " Hello.", "rejected": " Go away."}], tokenizer, TEXT)
        assert [tokenizer.decode(row[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")] == [
            "<s>Hi",
            " Hello.</s>",
            " Go away.</s>",
        ]

    def test_raw_text_that_is_ended_already_is_not_ended_twice(self):
        tokenizer = family("mistral")
        (row,) = pairs([{**PAIR, "chosen": " Hello.</s>", "rejected": " Go away."}], tokenizer, TEXT)
        assert tokenizer.decode(row["chosen_ids"]) == " Hello.</s>"
        assert tokenizer.decode(row["rejected_ids"]) == " Go away.</s>"

    def test_a_prompt_token_that_merges_with_one_answer_is_not_shared(self):
        tokenizer = family("qwen2.5")
        (row,) = pairs([{"prompt": "The weath", "chosen": "er", "rejected": "☂"}], tokenizer, TEXT)
        merged = tokenizer("The weather")["input_ids"]
        assert row["prompt_ids"] + row["chosen_ids"][:-1] == merged
        whole = tokenizer.decode([*row["prompt_ids"], *row["rejected_ids"]])
        assert whole == "The weath☂<|im_end|>"

    def test_answers_of_several_turns(self):
        answer = [
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "So?"},
            {"role": "assistant", "content": "So."},
        ]
        tokenizer = family("qwen2.5")
        prompt = [{"role": "user", "content": "Hi"}]
        for long, short in (("chosen", "rejected"), ("rejected", "chosen")):
            (row,) = pairs([{"prompt": prompt, long: answer, short: answer[:1]}], tokenizer)
            assert tokenizer.decode(row[f"{long}_ids"]) == (
                "Hello.<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
            )
            assert tokenizer.decode(row[f"{short}_ids"]) == "Hello.<|im_end|>"

    @pytest.mark.parametrize("settings", [{}, {"chat_template": "chatml"}])
    def test_a_tokenizer_without_template_gets_one(self, settings):
        config = DatasetConfig(name="x", **settings)
        for tokenise, row in ((pairs, PAIR), (prompts, {"prompt": "Hi"})):
            tokenizer = copy.deepcopy(family("llama3"))
            tokenizer.chat_template = None
            assert len(tokenise([row], tokenizer, config)) == 1
            assert tokenizer.chat_template == find_template(settings.get("chat_template", "plain"))

    def test_thoughts_on_one_side_only(self):
        tokenizer = family("qwen3")
        (row,) = pairs([{**PAIR, "chosen": "<think>\nHm.\n</think>\n\nHello."}], tokenizer)
        assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(row["chosen_ids"]) == "<think>\nHm.\n</think>\n\nHello.<|im_end|>"
        assert tokenizer.decode(row["rejected_ids"]) == "<think>\n\n</think>\n\nGo away.<|im_end|>"

    def test_dropped_pairs_are_counted_by_reason(self, caplog):
        rows = [
            PAIR,
            {**PAIR, "rejected": "Hello."},
            {**PAIR, "chosen": ""},
            {**PAIR, "rejected": " "},
            {**PAIR, "prompt": "Hi " * 100},
        ]
        with caplog.at_level(logging.WARNING):
            left = pairs(rows, family("llama3"), max_length=60, max_prompt_length=60)
        assert len(left) == 1
        assert (
            "dropped 4 of 5 rows: 2 (empty completion), 1 (chosen equals rejected), 1 (no room for a completion)"
            in caplog.text
        )

    def test_pairs_that_a_cut_makes_equal(self):
        rows = [{**PAIR, "chosen": "Yes, yes.", "rejected": "Yes, yes, but no."}]
        with pytest.raises(DataError, match="chosen equals rejected"):
            pairs(rows, family("llama3"), max_target_length=1)

    def test_preserved_columns(self):
        rows = pairs([{**PAIR, "id": 5}], family("llama3"), DatasetConfig(name="x", preserve_columns=["id"]))
        assert rows[0]["id"] == 5
        assert "id" not in pairs([{**PAIR, "id": 5}], family("llama3")).column_names

    def test_a_template_that_shows_the_prompt_in_two_ways_is_refused(self):
        tokenizer = family("qwen2.5")
        tokenizer.chat_template = "{{ messages[-1]['content'] | length }}" + tokenizer.chat_template
        with pytest.raises(DataError, match=r"(?s)row 0 \(preference\): .*"):
            pairs([PAIR], tokenizer)


class TestBudget:
    PROMPT, CHOSEN, REJECTED = np.arange(10), np.arange(100, 106), np.arange(200, 204)

    def cut(self, **lengths):
        return [ids.tolist() for ids in Budget(**lengths).cut_pair(self.PROMPT, self.CHOSEN, self.REJECTED)]

    def test_no_limits(self):
        assert self.cut() == [list(range(10)), list(range(100, 106)), list(range(200, 204))]

    def test_prompts_keep_the_side_that_is_asked_for(self):
        assert self.cut(max_prompt_length=3)[0] == [7, 8, 9]
        assert self.cut(max_prompt_length=3, truncation_mode="keep_start")[0] == [0, 1, 2]

    def test_completions_lose_their_end(self):
        assert self.cut(max_target_length=2)[1:] == [[100, 101], [200, 201]]

    def test_over_max_length_the_prompt_gives_way_to_the_longer_completion(self):
        # 14 - 6 = 8 tokens are left for the prompt
        assert self.cut(max_length=14) == [list(range(2, 10)), list(range(100, 106)), list(range(200, 204))]

    def test_but_keeps_half(self):
        assert self.cut(max_length=8) == [[6, 7, 8, 9], [100, 101, 102, 103], [200, 201, 202, 203]]

    def test_a_prompt_within_its_own_limit_is_not_cut_again(self):
        assert self.cut(max_length=8, max_prompt_length=6) == [[4, 5, 6, 7, 8, 9], [100, 101], [200, 201]]


class TestPrompts:
    def test_rows_keep_their_columns_for_the_rewards(self):
        tokenizer = family("llama3")
        rows = prompts([{"question": "1+1?", "answer": "2", "level": 3}], tokenizer)
        assert rows.column_names == [
            "prompt_ids",
            "prompt_text",
            "prompt_json",
            "length",
            "question",
            "answer",
            "level",
        ]
        text = (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        assert rows[0]["prompt_text"] == text == tokenizer.decode(rows[0]["prompt_ids"])
        assert rows[0]["answer"] == "2"
        assert asked_of(rows[0]) == [{"role": "user", "content": "1+1?"}]

    def test_or_only_those_that_are_named(self):
        config = DatasetConfig(name="x", preserve_columns=["answer"])
        rows = prompts([{"question": "1+1?", "answer": "2", "level": 3}], family("llama3"), config)
        assert rows.column_names == ["prompt_ids", "prompt_text", "prompt_json", "length", "answer"]

    def test_raw_prompts_begin_as_the_tokenizer_begins(self):
        tokenizer = family("mistral")
        (row,) = prompts([{"prompt": "1+1="}], tokenizer, TEXT)
        assert tokenizer.decode(row["prompt_ids"]) == "<s>1+1="
        assert asked_of(row) == "1+1="

    @pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
    def test_long_prompts_are_cut_and_counted(self, mode, caplog):
        rows = [{"prompt": "Hi"}, {"prompt": "Hi " * 100}]
        whole = prompts(rows, family("llama3"))
        with caplog.at_level(logging.WARNING):
            cut = prompts(rows, family("llama3"), max_prompt_length=40, truncation_mode=mode)
        assert f"cut 1 of 2 prompts to max_prompt_length 40 ({mode})" in caplog.text
        long = whole[1]["prompt_ids"]
        assert cut[1]["prompt_ids"] == (long[-40:] if mode == "keep_end" else long[:40])
        assert cut[0]["prompt_ids"] == whole[0]["prompt_ids"]

    def test_thinking(self):
        tokenizer = family("qwen3")
        off = prompts([{"prompt": "Hi"}], tokenizer, enable_thinking=False)[0]["prompt_text"]
        assert off == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        on = prompts([{"prompt": "Hi"}], tokenizer, enable_thinking=True)[0]["prompt_text"]
        assert on == off.removesuffix("<think>\n\n</think>\n\n")

    def test_empty_prompts_are_dropped(self, caplog):
        with caplog.at_level(logging.WARNING):
            assert len(prompts([{"prompt": "Hi"}, {"prompt": ""}], family("llama3"))) == 1
        chats = [{"prompt": [{"role": "user", "content": "Hi"}]}, {"prompt": []}]
        assert len(prompts(chats, family("llama3"))) == 1
        assert "1 (empty prompt)" in caplog.text

    def test_tools_of_the_config(self):
        config = DatasetConfig(name="x", tools=[{"name": "search"}])
        assert '{"name": "search"}' in prompts([{"prompt": "Hi"}], family("qwen2.5"), config)[0]["prompt_text"]

    def test_tools_may_be_functions(self):
        def add(a: int, b: int) -> int:
            """Add two numbers.

            Args:
                a: one number
                b: the other
            """
            return a + b

        text = prompts([{"prompt": "Hi"}], family("qwen2.5"), DatasetConfig(name="x", tools=[add]))[0]["prompt_text"]
        assert '"name": "add"' in text
        assert "Add two numbers." in text

    def test_a_function_without_a_description_is_refused(self):
        def add(a, b):
            return a + b

        with pytest.raises(DataError, match=r"tools: .*add.*docstring"):
            prompts([{"prompt": "Hi"}], family("qwen2.5"), DatasetConfig(name="x", tools=[add]))
