"""Setting a chat template, and the templates that ship."""

from __future__ import annotations

import logging

import pytest
from chat_families import byte_tokenizer, family

from aligntune.data.template import ChatTemplate, find_template, shipped_templates, use_template
from aligntune.errors import ConfigError, DataError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]

SHIPPED = {
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n"
        "### Instruction:\nBye\n\n### Response:\nSee you.</s>\n\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you.<|im_end|>\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSee you.<end_of_turn>\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nSee you.<|eot_id|>"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Bye [/INST] See you.</s>",
    "plain": "<s>System:\nBe brief.\n\nUser:\nHi\n\nAssistant:\nHello.</s>\n\nUser:\nBye\n\nAssistant:\nSee you.</s>\n\n",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n<|assistant|>\nSee you.</s>\n",
}
OWN_END = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}


def tokenizer_for(name):
    ends = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>")
    tokenizer = byte_tokenizer(("<pad>", "<s>", "</s>", *ends), eos="</s>", bos="<s>")
    use_template(tokenizer, name)
    return tokenizer


def test_every_shipped_template_has_a_test():
    assert shipped_templates() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_render_and_mark_answers(name):
    template = ChatTemplate(tokenizer_for(name))
    text, turns = template.turns(TALK)
    assert text == SHIPPED[name]
    end = OWN_END.get(name, "</s>")
    assert [text[turn.start : turn.end].lstrip(" ") for turn in turns] == [f"Hello.{end}", f"See you.{end}"]
    assert template.prompt(TALK[:-1]) == text[: turns[-1].start]


def test_alpaca_introduces_the_task_where_there_is_no_system_text():
    text, _ = ChatTemplate(tokenizer_for("alpaca")).turns(TALK[1:3])
    assert text == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n"
    )


def test_shipped_chatml_shows_tools_and_calls():
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": 2}}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3."},
    ]
    text, turns = ChatTemplate(tokenizer_for("chatml")).turns(
        messages, [{"type": "function", "function": {"name": "sum"}}]
    )
    assert '<tools>\n{"type": "function", "function": {"name": "sum"}}\n</tools><|im_end|>\n' in text
    assert [text[turn.start : turn.end] for turn in turns] == [
        '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
        "3.<|im_end|>",
    ]
    assert "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n" in text


def test_template_as_text_file_or_name(tmp_path):
    text = "{% for message in messages %}{{ message.content }}{% endfor %}"
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    assert find_template(text) == text
    assert find_template(str(path)) == text
    assert "<|im_start|>" in find_template("chatml")
    with pytest.raises(ConfigError, match=r"'chatmll' is neither.*alpaca, chatml"):
        find_template("chatmll")


def test_invalid_jinja_is_the_settings_fault():
    tokenizer = family("llama3")
    use_template(tokenizer, "{% for message in messages %}")
    with pytest.raises(ConfigError, match=r"not valid Jinja \(line 1\)"):
        ChatTemplate(tokenizer).turns(TALK)


def test_a_tokenizer_keeps_its_own_template_and_gets_one_when_it_has_none(caplog):
    tokenizer = family("llama3")
    own = tokenizer.chat_template
    use_template(tokenizer, None)
    assert tokenizer.chat_template == own
    tokenizer.chat_template = None
    with caplog.at_level(logging.WARNING):
        use_template(tokenizer, None, fallback="alpaca")
    assert tokenizer.chat_template == find_template("alpaca")
    assert "no chat template: using the shipped 'alpaca'" in caplog.text


def test_enable_thinking_needs_a_template_that_takes_it():
    with pytest.raises(ConfigError, match="no thinking mode"):
        ChatTemplate(family("llama3"), enable_thinking=True)
    assert ChatTemplate(family("llama3"), enable_thinking=False).arguments == {}
    assert ChatTemplate(family("qwen3"), enable_thinking=True).arguments == {"enable_thinking": True}


def test_an_empty_conversation_is_refused():
    with pytest.raises(DataError, match="the conversation is empty"):
        ChatTemplate(family("llama3")).turns([])
