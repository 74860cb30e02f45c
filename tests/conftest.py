"""Shared by all tests: one torch thread, no network, tiny models and tokenizers."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)
    # A shell's background job ignores Ctrl-C, for which some tests would then wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _no_search_through_what_is_loaded() -> None:
    """Every run of a trainer collects garbage, half a second each over the libraries' millions of objects: those are not garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _the_same_draws_in_any_order() -> None:
    """A test that sets no seed draws the same numbers whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Greedy answers end after four tokens, for tests that do not look at them: runs show some before and after training."""
    from aligntune.evaluation.answers import GreedyGenerator

    whole = GreedyGenerator.generate

    def short(self: Any, prompts: Any, *, max_new_tokens: int, **options: Any) -> list[str]:
        return whole(self, prompts, max_new_tokens=min(4, max_new_tokens), **options)

    with monkeypatch.context() as patch:
        patch.setattr(GreedyGenerator, "generate", short)
        yield
