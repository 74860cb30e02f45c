"""Tokenizers and chat templates in the style of real model families, small and made on the spot.

The templates are written for these tests after the conventions of the families that they are named for; they keep what makes
masks hard: default system prompts, no system role, no generation prompt, thinking that is dropped from earlier turns,
something written only at the very end, tools.
"""

from __future__ import annotations

import copy
from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "You are a helpful assistant. What is the capital of France? The capital of France is Paris.",
    "system user assistant model tool instruction response question answer hello world thank you",
    'def f(x):\n    return x + 1\n\n{"name": "search", "arguments": {"query": "weather"}}',
    "The weather is sunny today. It will rain tomorrow, I think. 1 2 3 4 5 6 7 8 9 10",
] * 4


def byte_tokenizer(special, *, eos, bos=None, trim=False, template=None) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in Qwen, Llama 3 and GPT-2; `trim` leaves blanks out of the tokens' characters, as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos is not None:
        ids = [(bos, tokenizer.token_to_id(bos))]
        steps = [processors.ByteLevel(trim_offsets=trim), processors.TemplateProcessing(f"{bos} $A", None, ids)]
        tokenizer.post_processor = processors.Sequence(steps)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=special[0])
    made.chat_template = template
    return made


def sentence_tokenizer(special, *, eos="</s>", bos="<s>", template=None) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback and BOS, as in Llama 2, Mistral and Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *special, *bytes_])
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.token_to_id(bos))])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=special[0])
    made.chat_template = template
    return made


CHATML = """{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- else %}
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Qwen 2.5: a default system prompt, tools, tool results as user turns."""

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
"""Llama 3: BOS in the template, contents trimmed."""

GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
"""Gemma 2: refuses a system role and turns that do not alternate."""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] + '\\n\\n' %}
{%- set turns = messages[1:] %}{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{{- bos_token }}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""
"""Mistral 7B: no generation prompt, a blank between [/INST] and the answer."""

ZEPHYR = """{%- for message in messages %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
{%- endfor %}"""
"""Zephyr: role headers that are plain text, EOS after every message."""

PHI3 = """{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- '<|system|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'user' %}{{- '<|user|>\\n' + message['content'] + '<|end|>\\n' }}
{%- elif message['role'] == 'assistant' %}{{- '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
"""Phi-3: writes end-of-text once, after the last turn, so no beginning of a conversation is a beginning of the whole."""

QWEN3 = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content %}{%- set reasoning = '' %}
{%- if message.reasoning_content %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
{{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
"""Qwen 3: the last answer gets a thinking block (empty if need be), earlier answers lose theirs."""

DEEPSEEK_R1 = """{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- message['content'] }}{%- endif %}
{%- if message['role'] == 'user' %}{{- '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' %}
{%- set content = message['content'].split('</think>')[-1] if '</think>' in message['content'] else message['content'] %}
{{- '<|Assistant|>' + content + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""
"""DeepSeek R1: the generation prompt opens a thinking block that rendered answers do not have."""

NO_PROMPT = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}"""
"""ChatML as written before generation prompts: `add_generation_prompt` does nothing."""

OPEN = """{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- if not loop.first %}{{- eos_token }}{%- endif %}{{- 'Q: ' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}{{- 'A: ' + message['content'] }}
{%- else %}{{- message['content'] + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'A: ' }}{%- endif %}"""
"""No special tokens in turns; EOS is written by the next question, and by nobody after the last answer."""

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def family(name: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer in the style of a model family, with its template."""
    return copy.deepcopy(_made(name))


@lru_cache
def _made(name: str) -> PreTrainedTokenizerFast:
    return {
        "qwen2.5": lambda: byte_tokenizer(IM, eos="<|im_end|>", template=CHATML),
        "qwen2.5-trim": lambda: byte_tokenizer(IM, eos="<|im_end|>", trim=True, template=CHATML),
        "llama3": lambda: byte_tokenizer(
            ("<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            eos="<|eot_id|>", bos="<|begin_of_text|>", template=LLAMA3,
        ),
        "gemma": lambda: sentence_tokenizer(
            ("<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), eos="<eos>", bos="<bos>", template=GEMMA
        ),
        "mistral": lambda: sentence_tokenizer(("<pad>", "<s>", "</s>", "[INST]", "[/INST]"), template=MISTRAL),
        "zephyr": lambda: sentence_tokenizer(("<pad>", "<s>", "</s>"), template=ZEPHYR),
        "phi3": lambda: byte_tokenizer(
            ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>", template=PHI3
        ),
        "qwen3": lambda: byte_tokenizer((*IM, "<think>", "</think>"), eos="<|im_end|>", template=QWEN3),
        "deepseek-r1": lambda: byte_tokenizer(
            ("<pad>", "<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"), eos="<|eos|>", bos="<|bos|>", template=DEEPSEEK_R1
        ),
        "no-prompt": lambda: byte_tokenizer(IM, eos="<|im_end|>", template=NO_PROMPT),
        "open": lambda: byte_tokenizer(IM, eos="<|endoftext|>", trim=True, template=OPEN),
    }[name]()  # fmt: skip
