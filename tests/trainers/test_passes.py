"""Passes of bounded size: how batches are cut, and that losses, gradients and weights do not see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from aligntune.algorithms.batch import Loss
from aligntune.core.backend_factory import create_rl_trainer, create_sft_trainer
from aligntune.errors import BackendError, ConfigError
from aligntune.models.packed import PackedRows
from aligntune.trainers.packed_sft import PackedRowsCollator, PackedSFTTrainer
from aligntune.trainers.pair_batches import Pairs
from aligntune.trainers.passes import BoundedPasses, SharesInPieces, cut
from comparing import without_timing

# Cutting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "limit", "pieces"), [
    ([4, 1, 9, 2, 3], None, [[0, 1, 2, 3, 4]]),
    ([4, 1, 9, 2, 3], 19, [[0, 1, 2, 3, 4]]),
    ([4, 1, 9, 2, 3], 6, [[0, 1], [2], [3, 4]]),  # the row of 9 alone; 10 tokens in two halves
    ([5, 5, 5, 5], 14, [[0, 1], [2, 3]]),
    ([2, 2, 2, 2, 2, 2], 9, [[0, 1, 2], [3, 4, 5]]),  # 6 and 6, not 8 and 4
    ([7], 3, [[0]]),
    ([], 3, [[]]),
], ids=str)  # fmt: skip
def test_pieces_by_hand(lengths: list[int], limit: int | None, pieces: list[list[int]]) -> None:
    assert cut(lengths, limit) == pieces


def test_padding_counts_where_rows_are_padded() -> None:
    """9 and 8 are 18 tokens, three short rows 6; without padding 9, 8 and 1 would fit into 18."""
    assert cut([9, 1, 8, 2, 2], 18, padded=True) == [[0, 2], [1, 3, 4]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120), st.booleans())
def test_every_row_once_and_no_piece_too_long(lengths: list[int], limit: int, padded: bool) -> None:
    pieces = cut(lengths, limit, padded=padded)
    assert sorted(place for piece in pieces for place in piece) == list(range(len(lengths)))
    assert pieces == sorted(sorted(piece) for piece in pieces)
    for piece in pieces:
        own = [lengths[place] for place in piece]
        tokens = max(own) * len(own) if padded else sum(own)
        assert tokens <= limit or len(piece) == 1
    if not padded:  # no two of them would fit together, so at most twice as many as needed
        assert len(pieces) <= 2 * -(-sum(lengths) // limit) + 1


def test_packed_rows_are_cut_between_documents() -> None:
    """One row of documents of 3, 2 and 4 tokens, and a row of 5: at most 7 tokens are two pieces, (3, 4) and (2, 5)."""
    rows = [
        {"input_ids": [11, 12, 13, 21, 22, 31, 32, 33, 34], "labels": [-100, 12, 13, -100, 22, -100, 32, -100, 34],
         "position_ids": [0, 1, 2, 0, 1, 0, 1, 2, 3]},
        {"input_ids": [41, 42, 43, 44, 45], "labels": [-100, -100, 43, 44, 45]},
    ]  # fmt: skip
    batch = PackedRowsCollator(micro_batch_tokens=7)(rows)
    first, second = (piece["rows"] for piece in batch["pieces"])
    assert first.input_ids.tolist() == [[11, 12, 13, 31, 32, 33, 34]]
    assert first.cu_seqlens.tolist() == [0, 3, 7]
    assert first.targets.tolist() == [12, 13, 32, 34]
    assert second.input_ids.tolist() == [[21, 22, 41, 42, 43, 44, 45]]
    assert second.targets.tolist() == [22, 43, 44, 45]
    assert batch["input_ids"].shape == (1, 14)
    (whole,) = PackedRowsCollator()(rows)["pieces"]
    assert whole["rows"].input_ids.tolist() == batch["input_ids"].tolist()
    filled = PackedRowsCollator(pad_to_multiple_of=4, micro_batch_tokens=7)(rows)["pieces"]
    assert [piece["rows"].input_ids.shape[1] for piece in filled] == [8, 8]
    padded = PackedRowsCollator(micro_batch_tokens=7, padded=True)(rows)[
        "pieces"
    ]  # (3, 2) are 6 tokens, (4, 3) would be 8
    assert [piece["rows"].cu_seqlens.diff().tolist() for piece in padded] == [[3, 2], [4], [5]]


@pytest.mark.parametrize(("total", "averages", "number"), [(None, True, 4), (12, True, 6), (12, False, 12)])
def test_what_a_loss_divides_by(total: int | None, averages: bool, number: int) -> None:
    """Its own 4 trained tokens, or the 12 of the optimiser batch: gradients are averaged over the 2 processes, so half where these
    are of both. Without any the loss is 0, not a number divided by 0."""
    trainer: Any = PackedSFTTrainer.__new__(PackedSFTTrainer)
    trainer.args = SimpleNamespace(average_tokens_across_devices=averages)
    trainer.accelerator = SimpleNamespace(num_processes=2)
    rows = PackedRows.from_completions([[1], [2]], [[3, 4, 5], [6]])
    assert trainer._number([{"rows": rows}], total) == number
    assert trainer._number([{"rows": PackedRows.build([[1, 2]], [[False, False]])}], None) == 1


def test_pairs_stay_whole() -> None:
    """2 * 2 + 1 + 3 = 8, 2 + 1 + 1 = 4 and 2 + 2 + 2 = 6 tokens; padded 10, 4 and 6."""
    pairs = Pairs([[1, 1], [2], [3]], [[4], [5], [6, 6]], [[7, 7, 7], [8], [9, 9]], ([[0.1], [0.2], [0.3]], [[0.4], [0.5], [0.6]]))  # fmt: skip
    assert [piece.prompts for piece in pairs.pieces(None)] == [pairs.prompts]
    first, second = pairs.pieces(10)
    assert (first.tokens, second.tokens) == (8, 10)
    assert (second.prompts, second.rejected, second.reference) == ([[2], [3]], [[8], [9, 9]], ([[0.2], [0.3]], [[0.5], [0.6]]))  # fmt: skip
    assert [len(piece) for piece in pairs.pieces(12, padded=True)] == [1, 2]
    assert [len(piece) for piece in pairs.pieces(11, padded=True)] == [1, 1, 1]


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("passes")
    tiny.write_model(folder / "model")
    words = tiny.WORDS
    tiny.write_rows(folder / "chats.jsonl", tiny.chats(24))
    tiny.write_rows(folder / "held.jsonl", tiny.chats(6, 100))
    tiny.write_rows(
        folder / "prompts.jsonl", [{"prompt": f"say {word * (1 + at % 3)}"} for at, word in enumerate(words)]
    )
    tiny.write_rows(folder / "pairs.jsonl", [
        {"prompt": f"say {word}", "chosen": word * (1 + at % 2), "rejected": words[(at + 5) % 16] + "z" * (at % 3)} for at, word in enumerate(words)
    ])  # fmt: skip
    tiny.write_rows(folder / "labels.jsonl", [{"text": f"{word} " * (1 + at % 4), "label": at % 2} for at, word in enumerate(words)])  # fmt: skip
    return folder


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes of each micro-batch that is trained on."""
    found: list[int] = []
    plain = BoundedPasses.passes

    def passes(self: Any, model: Any, pieces: Any) -> Any:
        found.append(len(pieces))
        return plain(self, model, pieces)

    monkeypatch.setattr(BoundedPasses, "passes", passes)
    return found


def supervised(files: Path, out: Path, data: str = "chats.jsonl", **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "batch_size": 6, "learning_rate": 0.1, "max_steps": 3, "log_interval": 1, "save_strategy": "no", "loggers": "none",
        "evaluation": {"max_new_tokens": 2, "compute_rouge": False, "compute_bleu": False}, "load_best_model_at_end": False, "optimizer": "sgd",
    }  # fmt: skip
    return create_sft_trainer(files / "model", files / data, output_dir=out, **(given | settings))


def learned(algorithm: str, files: Path, out: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "use_peft": False, "batch_size": 8, "learning_rate": 0.1, "max_steps": 3, "logging_steps": 1, "save_strategy": "no",
        "loggers": "none", "lr_scheduler": "constant", "optimizer": "sgd",
    }  # fmt: skip
    if algorithm != "dpo":
        given |= {"max_completion_length": 8, "temperature": 1.0, "top_p": 1.0, "reward_functions": ["length"]}
    data = "pairs.jsonl" if algorithm == "dpo" else "prompts.jsonl"
    return create_rl_trainer(files / "model", files / data, algorithm, output_dir=out, **(given | settings))


RUNS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "sft": (supervised, {}, 150),
    "sft dft": (supervised, {"loss_type": "dft", "gradient_accumulation_steps": 2, "eval_dataset": "held.jsonl", "eval_interval": 3}, 150),
    "sft packed": (supervised, {"packing": True, "max_seq_length": 256, "batch_size": 1}, 150),
    "classes": (supervised, {"data": "labels.jsonl", "dataset": {"task_type": "text_classification"}, "evaluation": {}}, 30),
    "dpo": (lambda *a, **k: learned("dpo", *a, **k), {"rpo_alpha": 0.5}, 150),
    "dpo aot": (lambda *a, **k: learned("dpo", *a, **k), {"loss_type": "aot", "batch_size": 4, "gradient_accumulation_steps": 2}, 150),
    "grpo": (lambda *a, **k: learned("grpo", *a, **k), {"num_generations": 4, "kl_coef": 0.1, "mask_truncated_completions": False}, 150),
    "ppo": (lambda *a, **k: learned("ppo", *a, **k), {"num_ppo_epochs": 2, "missing_eos_penalty": 0.0, "max_grad_norm": 0.0, "mask_truncated_completions": False}, 150),
}  # fmt: skip
"""How to make a run, its settings, and the tokens of a pass. SGD: Adam's first steps make any gradient's sign a step."""


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("short_answers")
def test_a_cut_batch_trains_as_a_whole_one(name: str, files: Path, tmp_path: Path, counts: list[int]) -> None:
    """Losses, gradient norms, metrics, token counts, evaluations and weights."""
    make, settings, tokens = RUNS[name]
    settings = settings | (
        {"eval_dataset": str(files / settings["eval_dataset"])} if "eval_dataset" in settings else {}
    )
    sessions, passes, trails, splits = [], [], [], []
    for limit in (None, tokens):
        counts.clear()
        session = make(files, tmp_path / str(limit), backend="native", micro_batch_tokens=limit, **settings)
        session.train()
        rows = [json.loads(line) for line in (session.directory.path / "metrics.jsonl").read_text().splitlines()]
        trails.append([without_timing(row) for row in rows])
        splits.append([row.pop("split") for row in trails[-1]])
        sessions.append(session)
        passes.append(list(counts))
    whole, pieces = passes
    assert set(whole) == {1}
    assert len(pieces) == len(whole)
    assert min(pieces) > 1
    assert splits[0] == splits[1]
    assert splits[0].count("train") == 3
    for expected, found in zip(*trails, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    start = dict(make(files, tmp_path / "start", backend="native", **settings).model.named_parameters())
    moved = 0.0
    for (key, weight), (_, other) in zip(*(session.model.named_parameters() for session in sessions), strict=True):
        torch.testing.assert_close(other, weight, rtol=0, atol=1e-6)
        moved = max(moved, float((weight - start[key]).detach().abs().max()))
    assert moved > 1e-4


def test_another_backend_gives_way(files: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="micro_batch_tokens"):
        supervised(files, tmp_path, backend="trl", fallback=False, micro_batch_tokens=100)
    assert learned("grpo", files, tmp_path, backend="auto", skip_backends=["unsloth"], micro_batch_tokens=9).backend == "native"  # fmt: skip
    with pytest.raises(ConfigError, match="DeepSpeed"):
        supervised(files, tmp_path, micro_batch_tokens=9, launch={"launcher": "accelerate", "strategy": "zero3"})


# Processes ------------------------------------------------------------------------------------------------------------


class Told(SharesInPieces):
    """A process of several, whose neighbour has three pieces."""

    micro_batch_tokens = 9

    def __init__(self, sharded: bool) -> None:
        self.is_fsdp_enabled = sharded
        self.waiting = False
        self.accelerator = SimpleNamespace(num_processes=2, no_sync=lambda model: self._waits())

    def agree(self, count: int) -> int:
        return max(count, 3)

    def _waits(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def waits() -> Any:
            self.waiting = True
            yield
            self.waiting = False

        return waits()


def test_gradients_are_reduced_once_and_shards_are_read_in_step() -> None:
    model = torch.nn.Linear(1, 1)
    plain, sharded = Told(False), Told(True)
    assert [(piece, counts, plain.waiting) for piece, counts in plain.passes(model, "ab")] == [
        ("a", True, True), ("b", True, False),
    ]  # fmt: skip
    seen = [(piece, counts, model.training, sharded.waiting) for piece, counts in sharded.passes(model, "ab")]
    assert seen == [("a", True, True, False), ("b", True, True, False), ("b", False, False, False)]
    assert model.training


def test_a_repeated_piece_adds_nothing() -> None:
    """Two pieces of three under FSDP on two processes: (1 + 2) * 2, since gradients are averaged over processes."""
    trainer: Any = Told(True)
    sent: list[float] = []
    trainer.accelerator.backward = lambda value: sent.append(float(value))
    trainer.is_deepspeed_enabled = False
    trainer.compute_loss_context_manager = nullcontext
    losses = {"a": 1.0, "b": 2.0}
    value, metrics = trainer.train_on(
        torch.nn.Linear(1, 1),
        "ab",
        lambda piece: Loss(torch.tensor(losses[piece]), {"of": torch.tensor(losses[piece])}),
    )
    assert float(value) == 6
    assert sent == [2, 4, 0]
    assert [float(entry["of"]) for entry in metrics] == [1, 2]
