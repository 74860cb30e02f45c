"""A tiny random chat model and small datasets, made on the spot for tests that need a whole run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = [
    "red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star", "up", "down", "left", "right",
]  # fmt: skip


def tokenizer(chat_template: str | None = CHATML) -> Any:
    """Byte-level, 259 tokens: no text is unknown, and every character is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = chat_template
    return made


def model(seed: int = 0, **changes: Any) -> Any:
    """A random Llama of about 50 thousand parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": 2, "attention_dropout": 0.0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The model and its tokenizer, saved."""
    model(seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Questions whose answer repeats the last word: learnable in a few dozen steps."""
    return [
        {"messages": [
            {"role": "user", "content": f"say {WORDS[(at * 7) % len(WORDS)]} {WORDS[(at * 3 + 1) % len(WORDS)]}"},
            {"role": "assistant", "content": WORDS[(at * 3 + 1) % len(WORDS)]},
        ]}
        for at in range(start, start + count)
    ]  # fmt: skip


def alpaca(count: int) -> list[dict[str, Any]]:
    """The same in alpaca's columns."""
    return [
        {"instruction": f"say {WORDS[at % len(WORDS)]}", "input": "", "output": WORDS[at % len(WORDS)] * (1 + at % 3)}
        for at in range(count)
    ]


def settings_of(algorithm: str, **train: Any) -> Any:
    """The training settings of a run, resolved as a trainer and a loss get them."""
    from aligntune.config.resolve import resolve

    rewards = [] if algorithm == "dpo" else ["length"]
    run = {"model": {"name_or_path": "tiny"}, "dataset": {"name": "rows.jsonl"}, "train": train, "rewards": rewards}
    return resolve(run, algorithm=algorithm).config.train
