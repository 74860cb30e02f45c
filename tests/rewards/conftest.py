"""A tiny random encoder, a tiny random reward model and a judge on this machine, so that no test needs a download."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "rug",
    "red",
    "blue",
    "quickly",
    "slowly",
    "and",
    "then",
    "it",
    "was",
    "happy",
    "sad",
    "bird",
]


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=64,
    )  # fmt: skip


def tiny_bert(kind: Any, **options: Any) -> Any:
    import torch
    from transformers import BertConfig

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5, pad_token_id=0, **options,
    )  # fmt: skip
    return kind(config).eval()


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tiny_bert(BertModel).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    tiny_bert(BertForSequenceClassification, num_labels=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Judge:
    """An OpenAI-compatible endpoint on 127.0.0.1. `answer` maps a request to (status, reply); `requests` are kept."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Answer = lambda request: (200, reply("Score: 5"))
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(request | {"path": self.path})
                judge.headers.append(dict(self.headers))
                status, body = judge.answer(request)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 64})
        self.server = server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def reply(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def serving() -> Iterator[Judge]:
    made = Judge()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def judge() -> Iterator[Judge]:
    yield from serving()


@pytest.fixture(scope="module")
def common_judge() -> Iterator[Judge]:
    """One server for all tests of a file, which do not look at its requests."""
    yield from serving()
