"""A token loss and callbacks of one's own, in supervised fine-tuning and DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import tiny
from aligntune.algorithms.base import get
from aligntune.core.backend_factory import create_rl_trainer, create_sft_trainer
from aligntune.data.functions import find_function
from aligntune.errors import BackendError, ConfigError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "train.jsonl", tiny.chats(16))
    pairs = [{"prompt": f"say {word}", "chosen": word, "rejected": word[::-1]} for word in tiny.WORDS]
    tiny.write_rows(folder / "pairs.jsonl", pairs)
    return folder


def sft(files: Path, out: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "batch_size": 4, "learning_rate": 3e-3, "max_steps": 3, "log_interval": 1, "loggers": "none", "backend": "native",
        "save_strategy": "no", "evaluation": {"max_new_tokens": 4},
    }  # fmt: skip
    return create_sft_trainer(files / "model", files / "train.jsonl", output_dir=out, **(given | settings))


def dpo(files: Path, out: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "precision": "fp32", "batch_size": 4, "learning_rate": 3e-3, "max_steps": 3, "logging_steps": 1, "loggers": "none", "backend": "native",
        "save_strategy": "no", "use_peft": False,
    }  # fmt: skip
    return create_rl_trainer(files / "model", files / "pairs.jsonl", "dpo", output_dir=out, **(given | settings))


def losses(session: Any) -> list[float]:
    session.train(overwrite=True)
    return [entry["loss"] for entry in session.trainer.state.log_history if "loss" in entry]


def focal(log_probs: Tensor) -> Tensor:
    """(1 - p)^2 * -log p (Lin et al. 2017)."""
    return -((1 - log_probs.exp()) ** 2) * log_probs


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"gradient_accumulation_steps": 2, "batch_size": 2}], ids=str)  # fmt: skip
def test_minus_the_log_probability_is_cross_entropy(files: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = losses(sft(files, tmp_path / "plain", **settings))
    assert losses(sft(files, tmp_path / "own", loss_function=torch.neg, **settings)) == pytest.approx(plain, abs=1e-6)


def test_a_token_loss_of_ones_own(files: Path, tmp_path: Path) -> None:
    """Tokens that are hit with some certainty weigh less than in cross-entropy; perplexity stays that of cross-entropy."""
    settings = {"eval_dataset": str(files / "train.jsonl"), "eval_interval": 3}
    own, plain = (
        sft(files, tmp_path / name, max_steps=1, learning_rate=1e-12, **settings, **more)
        for name, more in (("own", {"loss_function": "trainers.test_own:focal"}), ("plain", {}))
    )
    one, other = losses(own)[0], losses(plain)[0]
    assert 0.5 * other < one < other
    assert own.metrics["eval_loss"] < plain.metrics["eval_loss"]
    assert own.metrics["eval_perplexity"] == pytest.approx(plain.metrics["eval_perplexity"], rel=1e-6)


def mean(log_probs: Tensor) -> Tensor:
    return -log_probs.mean()


def number(log_probs: Tensor) -> float:
    return 1.0


@pytest.mark.parametrize(("settings", "message"), [
    ({"loss_function": mean}, r"should return the loss of each token, \(\d+,\), got a tensor \(\)"),
    ({"loss_function": number}, r"should return the loss of each token, .* got float 1\.0"),
    ({"loss_function": focal, "loss_type": "dft"}, "loss_type: has no effect beside loss_function"),
    ({"loss_function": focal, "label_smoothing_factor": 0.1}, "label_smoothing_factor: has no effect beside loss_function"),
    ({"loss_function": focal, "task_type": "text_classification"}, "loss_function: has no effect on text_classification"),
    ({"callbacks": [3]}, "callbacks: .*should be a TrainerCallback"),
    ({"callbacks": ["trainers.test_own:mean"]}, "callbacks: .* is no TrainerCallback"),
])  # fmt: skip
def test_what_cannot_be_is_refused(files: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sft(files, tmp_path / "out", **settings).train()


def test_other_backends_have_no_place_for_a_loss(files: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="has no place for loss_function"):
        sft(files, tmp_path / "out", backend="trl", fallback=False, loss_function=focal)


def test_a_pair_loss_of_ones_own(files: Path, tmp_path: Path) -> None:
    plain = losses(dpo(files, tmp_path / "plain"))
    assert losses(dpo(files, tmp_path / "same", loss_function=get("dpo").loss)) == plain

    def margin(batch: Any, config: Any, normalizers: Any) -> Tensor:
        gap = batch.chosen_log_probs.masked_fill(~batch.chosen_mask, 0).sum(1) - batch.rejected_log_probs.masked_fill(~batch.rejected_mask, 0).sum(1)  # fmt: skip
        return torch.relu(100 - gap).sum() / normalizers.num_sequences

    assert losses(dpo(files, tmp_path / "margin", loss_function=margin))[0] > 50


class Steps(TrainerCallback):
    seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.global_step)


class StopsAtTwo(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.adapter
@pytest.mark.parametrize("backend", ["native", "trl"])
@pytest.mark.parametrize("given", [Steps, Steps(), "trainers.test_own:Steps"], ids=["class", "object", "address"])
def test_callbacks_are_called(files: Path, tmp_path: Path, backend: str, given: Any) -> None:
    called = find_function(given, "callbacks") if isinstance(given, str) else Steps
    for make in (sft, dpo):
        called.seen.clear()
        session = make(files, tmp_path / make.__name__, backend=backend, callbacks=[given, StopsAtTwo])
        session.train()
        assert called.seen == [1, 2]
        assert "callbacks" in (session.directory.path / "config.yaml").read_text()
