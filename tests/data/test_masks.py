"""Which characters are trained, on eleven styles of chat template: expected strings written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from chat_families import byte_tokenizer, family
from datasets import Dataset

from aligntune.config.sft import DatasetConfig
from aligntune.data import masks
from aligntune.data.masks import IGNORED, encode_spans, in_parts
from aligntune.data.template import ChatTemplate
from aligntune.data.tokenize import tokenize_sft
from aligntune.errors import DataError

USER, PARIS = {"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}
MORE, RAIN = {"role": "user", "content": "And the weather?"}, {"role": "assistant", "content": "It will rain. ☂️"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [USER, PARIS, MORE, RAIN]


def tokens_of(tokenizer, messages, tools=None, **options):
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    rows = Dataset.from_list([row], on_mixed_types="use_json")
    return tokenize_sft(rows, tokenizer, DatasetConfig(name="x"), max_length=None, **options)[0]


def trained_text(tokenizer, row) -> str:
    ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
    assert labels[0] == IGNORED
    assert ((labels == ids) | (labels == IGNORED)).all()
    return tokenizer.decode(ids[labels != IGNORED])


def trained(name, messages, tools=None, **options) -> str:
    tokenizer = family(name)
    return trained_text(tokenizer, tokens_of(tokenizer, messages, tools, assistant_only_loss=True, **options))


ENDS = {
    "qwen2.5": "<|im_end|>",
    "qwen2.5-trim": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "zephyr": "</s>",
    "phi3": "<|end|>",
    "deepseek-r1": "<|eos|>",
    "no-prompt": "<|im_end|>",
}


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("name", ENDS)
def test_assistant_texts_and_end_of_turn_are_trained_and_nothing_else(name, system):
    end = ENDS[name]
    assert trained(name, [*system, *TALK]) == f"Paris.{end}It will rain. ☂️{end}"


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
def test_mistral_answers_begin_with_the_blank_that_the_model_has_to_write(system):
    assert trained("mistral", [*system, *TALK]) == " Paris.</s> It will rain. ☂️</s>"


def test_a_template_without_stop_tokens_gets_one_and_a_token_over_the_edge_of_the_prompt_is_trained():
    assert (
        trained("open", TALK) == " Paris.<|endoftext|> It will rain. ☂️<|endoftext|>"
    )  # "A: " + "Paris" has the token " P..."


def test_completion_only_trains_the_last_answer_of_a_conversation():
    tokenizer = family("llama3")
    row = tokens_of(tokenizer, TALK, completion_only_loss=True)
    assert trained_text(tokenizer, row) == "It will rain. ☂️<|eot_id|>"


def test_without_a_mask_all_tokens_but_the_first_are_trained():
    tokenizer = family("llama3")
    row = tokens_of(tokenizer, [USER, PARIS])
    assert trained_text(tokenizer, row) == (
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis.<|eot_id|>"
    )


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral", "deepseek-r1"])
def test_one_beginning_of_sequence_token(name):
    tokenizer = family(name)
    ids = tokens_of(tokenizer, TALK)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", [*ENDS, "mistral", "qwen3", "open"])
def test_tokens_are_those_of_the_rendered_text(name):
    tokenizer = family(name)
    ids = tokens_of(tokenizer, TALK)["input_ids"]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    if name == "open":  # ends without a stop token, which is added
        expected = [*expected, tokenizer.eos_token_id]
    assert ids == expected


class TestThinking:
    def test_last_answer_trains_the_empty_block_that_the_template_writes(self):
        assert trained("qwen3", [USER, PARIS]) == "<think>\n\n</think>\n\nParis.<|im_end|>"

    def test_earlier_answers_have_none(self):
        assert trained("qwen3", TALK) == "Paris.<|im_end|><think>\n\n</think>\n\nIt will rain. ☂️<|im_end|>"

    def test_thoughts_of_the_last_answer_are_trained_and_earlier_ones_are_dropped(self):
        first = {"role": "assistant", "content": "<think>\nFrance...\n</think>\n\nParis."}
        last = {"role": "assistant", "content": "Rain.", "reasoning_content": "Clouds."}
        assert trained("qwen3", [USER, first, MORE, last]) == (
            "Paris.<|im_end|><think>\nClouds.\n</think>\n\nRain.<|im_end|>"
        )

    def test_with_thinking_off_the_empty_block_belongs_to_the_prompt(self):
        template = ChatTemplate(family("qwen3"), enable_thinking=False)
        text, (turn,) = template.turns([USER, PARIS])
        assert text[turn.start : turn.end] == "Paris.<|im_end|>"
        assert template.prompt([USER]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")

    def test_with_thinking_off_earlier_answers_without_the_block_are_found(self):
        template = ChatTemplate(family("qwen3"), enable_thinking=False)
        text, turns = template.turns(TALK)
        assert [text[turn.start : turn.end] for turn in turns] == ["Paris.<|im_end|>", "It will rain. ☂️<|im_end|>"]

    def test_thoughts_after_a_prompt_that_says_no_thoughts_are_refused(self):
        template = ChatTemplate(family("qwen3"), enable_thinking=False)
        with pytest.raises(DataError, match="hides where message 1 begins"):
            template.turns([USER, {**PARIS, "reasoning_content": "Well."}])

    def test_thoughts_between_tool_calls_are_dropped_once_a_new_question_comes(self):
        call = {"role": "assistant", "content": "", "reasoning_content": "Look it up.",
                "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"query": "Paris"}}}]}  # fmt: skip
        result = {"role": "tool", "content": "sunny"}
        answer = {"role": "assistant", "content": "Sunny.", "reasoning_content": "It says sunny."}
        rendered_call = '<tool_call>\n{"name": "search", "arguments": {"query": "Paris"}}\n</tool_call><|im_end|>'
        assert trained("qwen3", [USER, call, result, answer]) == (
            f"<think>\nLook it up.\n</think>\n\n{rendered_call}<think>\nIt says sunny.\n</think>\n\nSunny.<|im_end|>"
        )
        assert trained("qwen3", [USER, call, result, answer, MORE, PARIS]) == (
            f"{rendered_call}Sunny.<|im_end|><think>\n\n</think>\n\nParis.<|im_end|>"
        )

    def test_a_generation_prompt_that_opens_a_block_is_not_part_of_answers_without_one(self):
        text, (turn,) = ChatTemplate(family("deepseek-r1")).turns(
            [USER, {"role": "assistant", "content": "<b>Paris</b>"}]
        )
        assert text[turn.start : turn.end] == "<b>Paris</b><|eos|>"


class TestTools:
    CALL = {"from": "function_call", "value": '{"name": "search", "arguments": {"query": "weather", "days": 2}}'}
    TOOLS = '[{"name": "search", "description": "Search.", "parameters": {"type": "object"}}]'

    def talk(self):
        return [{"from": "human", "value": "Weather?"}, self.CALL, {"from": "observation", "value": '{"sky": "clear"}'},
                {"from": "gpt", "value": "Clear sky."}]  # fmt: skip

    def test_calls_and_answers_are_trained_and_results_are_not(self):
        assert trained("qwen2.5", self.talk(), tools=self.TOOLS) == (
            '<tool_call>\n{"name": "search", "arguments": {"query": "weather", "days": 2}}\n</tool_call><|im_end|>'
            "Clear sky.<|im_end|>"
        )

    def test_tools_are_shown_to_the_model(self):
        tokenizer = family("qwen2.5")
        text = tokenizer.decode(tokens_of(tokenizer, self.talk(), self.TOOLS)["input_ids"])
        assert '<tools>\n{"type": "function", "function": {"name": "search"' in text
        assert '<|im_start|>user\n<tool_response>\n{"sky": "clear"}\n</tool_response><|im_end|>' in text

    def test_a_template_without_a_place_for_tools_refuses_them(self):
        with pytest.raises(DataError, match=r"(?s)row 0.*tools.*no place for them.*messages:"):
            trained("llama3", [USER, PARIS], tools=self.TOOLS)

    def test_a_template_that_drops_tool_calls_refuses_them(self):
        with pytest.raises(DataError, match="tool_calls, and the chat template does not show it"):
            trained("llama3", self.talk())

    def test_calls_that_a_template_shows_only_elsewhere_are_refused(self):
        tokenizer = family("llama3")  # as DeepSeek R1's template: calls count only where the content is none
        tokenizer.chat_template += "{% if messages[-1]['content'] is none %}{{ messages[-1]['tool_calls'] }}{% endif %}"
        with pytest.raises(DataError, match="has tool_calls, and the chat template renders it without them"):
            tokens_of(tokenizer, [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}])

    def test_a_template_that_drops_results_refuses_them(self):
        with pytest.raises(DataError, match="tool results, and the chat template does not show them"):
            trained("phi3", [USER, PARIS, {"role": "tool", "content": "42"}, RAIN])


class TestRefusals:
    def test_no_assistant_turn(self):
        with pytest.raises(
            DataError, match=r"(?s)row 0 \(messages\): the conversation has no assistant turn.*capital of Fr"
        ):
            trained("llama3", [USER])

    def test_the_templates_own_words_are_shown(self):
        with pytest.raises(DataError, match=r"(?s)row 0.*must alternate.*messages:"):
            trained("gemma", [USER, PARIS, RAIN])

    def test_a_template_that_rewrites_answers(self):
        tokenizer = family("llama3")
        tokenizer.chat_template = tokenizer.chat_template.replace("| trim", "| upper")
        with pytest.raises(DataError, match=r"(?s)row 0.*does not show the assistant's text as it is: 'Paris.'"):
            tokens_of(tokenizer, [USER, PARIS], assistant_only_loss=True)

    def test_a_template_whose_header_changes_with_the_answer(self):
        tokenizer = family("no-prompt")
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "+ '\\n' +", "+ (message['content'] | length | string) +"
        )
        with pytest.raises(DataError, match=r"row 0.*hides where message 1 begins"):
            tokens_of(tokenizer, [USER, RAIN], assistant_only_loss=True)

    def test_reasoning_that_a_template_does_not_show(self):
        with pytest.raises(DataError, match="reasoning_content, and the chat template does not show it"):
            trained("llama3", [USER, {**PARIS, "reasoning_content": "Hm."}])
        for key in ("thinking", "reasoning"):  # the template reads reasoning_content
            with pytest.raises(DataError, match=f"has {key}, and the chat template does not show it"):
                trained("qwen3", [USER, {**PARIS, key: "Hm."}])


class TestSystem:
    def test_text_goes_in_front_of_the_first_question_where_there_is_no_system_role(self, caplog):
        tokenizer = family("gemma")
        row = tokens_of(tokenizer, [SYSTEM, USER, PARIS])
        assert tokenizer.decode(row["input_ids"]) == (
            "<bos><start_of_turn>user\nBe brief.\n\nWhat is the capital of France?<end_of_turn>\n"
            "<start_of_turn>model\nParis.<end_of_turn>\n"
        )

    def test_turn_numbers_are_those_of_the_messages_as_given(self):
        _, turns = ChatTemplate(family("gemma")).turns([SYSTEM, *TALK])
        assert [turn.index for turn in turns] == [2, 4]

    def test_a_later_one_that_the_template_drops_is_refused(self):
        assert trained("llama3", [*TALK[:2], SYSTEM, *TALK[2:]]) == "Paris.<|eot_id|>It will rain. ☂️<|eot_id|>"
        with pytest.raises(DataError, match="system message after its first message"):
            trained("qwen3", [*TALK[:2], SYSTEM, *TALK[2:]])


class TestPrompt:
    """The text that a model gets is the text before the first trained character."""

    @pytest.mark.parametrize("name", sorted({*ENDS, "mistral", "qwen3", "open"} - {"deepseek-r1"}))
    def test_prompt_is_what_stands_before_the_answer(self, name):
        template = ChatTemplate(family(name))
        text, turns = template.turns(TALK)
        assert template.prompt([USER, PARIS, MORE]) == text[: turns[-1].start]

    def test_a_last_assistant_message_is_continued(self):
        prompt = ChatTemplate(family("llama3")).prompt([USER, {"role": "assistant", "content": "The capital"}])
        assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\nThe capital")


def test_conversation_that_begins_with_the_assistant():
    hello = {"role": "assistant", "content": "Hello!"}
    assert trained("llama3", [hello, USER, PARIS]) == "Hello!<|eot_id|>Paris.<|eot_id|>"


def test_two_assistant_turns_in_a_row():
    assert trained("llama3", [USER, PARIS, RAIN]) == "Paris.<|eot_id|>It will rain. ☂️<|eot_id|>"


@pytest.mark.parametrize("trim", ["qwen2.5", "qwen2.5-trim"])
@pytest.mark.parametrize("answer", ["  indented code", "\n\nnew lines", "é", "日本語", "☂️", " ", "a", "🇫🇷 x 🇫🇷"])
def test_round_trip_of_answers_with_blanks_and_bytes(trim, answer):
    assert trained(trim, [USER, {"role": "assistant", "content": answer}]) == f"{answer}<|im_end|>"


def test_a_template_whose_turns_only_end_where_the_next_begins():
    """The end of the first answer is not marked by any token, but both ends are still found."""
    tokenizer = family("qwen2.5")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert trained_text(tokenizer, tokens_of(tokenizer, TALK, assistant_only_loss=True)) == (
        " Paris.\n It will rain. ☂️\n<|im_end|>"
    )


def test_a_marker_that_is_no_token_of_the_tokenizer_is_text_and_the_end_is_taught_all_the_same():
    tokenizer = family("llama3")
    tokenizer.chat_template = family("no-prompt").chat_template  # "<|im_end|>" is plain text here
    assert trained_text(tokenizer, tokens_of(tokenizer, [USER, PARIS], assistant_only_loss=True)) == (
        "Paris.<|im_end|>\n<|eot_id|>"
    )


def test_the_last_turn_may_end_with_a_token_of_its_own():
    """As gpt-oss does: "<|return|>" at the very end, "<|end|>" between turns. Both are taught."""
    tokenizer = byte_tokenizer(("<pad>", "<|start|>", "<|message|>", "<|end|>", "<|return|>"), eos="<|return|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
        "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
    )
    for options in ({"assistant_only_loss": True}, {"completion_only_loss": True}):
        assert trained_text(tokenizer, tokens_of(tokenizer, [USER, PARIS], **options)) == "Paris.<|return|>"
    assert trained_text(tokenizer, tokens_of(tokenizer, TALK, assistant_only_loss=True)) == (
        "Paris.<|end|>It will rain. ☂️<|return|>"
    )


def test_an_end_that_only_the_whole_conversation_has():
    tokenizer = family("zephyr")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% else %}{{ eos_token }}{% endif %}"
    )
    assert trained_text(tokenizer, tokens_of(tokenizer, [USER, PARIS], assistant_only_loss=True)).endswith(
        "Paris.\n</s>"
    )


def test_long_texts_are_tokenised_a_few_at_a_time(monkeypatch) -> None:
    """The tokenizer keeps so much about each token that a thousand long rows at once took tens of gigabytes."""
    tokenizer, texts = family("mistral"), ["abc" * size for size in (1, 2, 30, 1, 1, 4)]
    spans = [[(1, len(text))] for text in texts]
    whole = encode_spans(tokenizer, texts, spans)
    seen = []
    monkeypatch.setattr(masks, "AT_ONCE", 12)
    monkeypatch.setattr(
        masks, "_encode", lambda _, part, own, inner=masks._encode: seen.append(list(part)) or inner(_, part, own)
    )
    parts = encode_spans(tokenizer, texts, spans)
    assert [list(map(len, part)) for part in seen] == [[3, 6], [90], [3, 3], [12]]
    assert [(row.ids.tolist(), row.ranges) for row in parts] == [(row.ids.tolist(), row.ranges) for row in whole]
    assert list(in_parts([], 5)) == []
