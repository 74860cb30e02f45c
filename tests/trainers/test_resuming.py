"""What a run makes of a checkpoint: of another end, an early stop, another folder, and of damage; and which it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

import tiny
from aligntune.api import create_sft_trainer
from aligntune.errors import ConfigError
from aligntune.trainers.keeping import SaveBest
from aligntune.trainers.resuming import _BestCheckpoint, _read_optimizer, other_rows
from comparing import without_timing


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    tiny.write_model(folder / "model")
    tiny.write_rows(folder / "train.jsonl", tiny.chats(16))
    tiny.write_rows(folder / "eval.jsonl", tiny.chats(4, 100))
    return folder


def run(files: Path, out: Path, resume: Any = None, **settings: Any) -> Any:
    """A trained session; without other settings, one whose rate is so high that its evaluations get worse from step 4 on."""
    given: dict[str, Any] = {
        "precision": "fp32", "batch_size": 2, "learning_rate": 2.0, "max_grad_norm": 100.0, "lr_scheduler": "constant", "warmup_ratio": 0.0,
        "max_steps": 12, "eval_interval": 2, "save_interval": 2, "log_interval": 1, "loggers": "none", "log_level": "ERROR", "backend": "native",
        "eval_dataset": str(files / "eval.jsonl"), "evaluation": {"max_new_tokens": 2, "compute_rouge": False, "compute_bleu": False},
    }  # fmt: skip
    found = create_sft_trainer(
        str(files / "model"), str(files / "train.jsonl"), output_dir=str(out), **(given | settings)
    )
    found.train(resume=resume)
    return found


def trail(folder: Path) -> list[dict[str, Any]]:
    return [without_timing(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"checkpoint-{step}"


def test_more_steps_go_on_from_where_a_finished_run_ended(files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "long", max_steps=6, learning_rate=1e-2)
    run(files, tmp_path / "run", max_steps=4, learning_rate=1e-2)
    run(files, tmp_path / "run", "auto", max_steps=6, learning_rate=1e-2)
    assert trail(tmp_path / "run") == trail(tmp_path / "long")
    again = run(files, tmp_path / "run", "auto", max_steps=6, learning_rate=1e-2)  # nothing is left
    assert again.trainer.state.global_step == 6
    again = run(files, tmp_path / "run", "auto", max_steps=None, epochs=1, learning_rate=1e-2)  # 8 steps
    assert again.trainer.state.global_step == 8


def test_an_early_stop_is_at_the_same_step_after_a_resume(files: Path, tmp_path: Path) -> None:
    whole = run(files, tmp_path / "whole", early_stopping_patience=2)
    best, last = whole.trainer.state.best_global_step, whole.trainer.state.global_step
    assert 0 < best < last < 12
    expected = trail(tmp_path / "whole")
    for step in (best, best + 2):  # none and one of the two evaluations that are no better
        run(files, tmp_path / "whole", checkpoint(tmp_path / "whole", step), early_stopping_patience=2)
        assert trail(tmp_path / "whole") == expected
    shutil.rmtree(tmp_path / "whole" / "model")  # killed between its stop and its end
    again = run(files, tmp_path / "whole", "auto", early_stopping_patience=2)
    assert trail(tmp_path / "whole") == expected
    assert again.metrics == pytest.approx(whole.metrics)
    assert run(files, tmp_path / "whole", "auto", early_stopping_patience=3).trainer.state.global_step == last + 2


@pytest.mark.parametrize("step", [8, 10], ids=["unfinished", "finished"])
def test_a_run_that_was_moved_keeps_its_best_weights(files: Path, tmp_path: Path, step: int) -> None:
    first = run(files, tmp_path / "first", max_steps=10)
    best = first.trainer.state.best_global_step
    assert best < 8
    shutil.move(tmp_path / "first", tmp_path / "moved")
    moved = run(files, tmp_path / "moved", checkpoint(tmp_path / "moved", step), max_steps=10)
    assert moved.trainer.evaluate()["eval_loss"] == pytest.approx(first.metrics["eval_loss"], abs=1e-6)


def test_the_best_weights_of_a_copied_run_are_its_own(tmp_path: Path) -> None:
    """The folder of that name beside the checkpoint; elsewhere only where there is none; gone, the best is sought anew."""
    written, copied = (checkpoint(tmp_path / name, 2) for name in ("first", "copy"))

    def corrected() -> tuple[Any, ...]:
        state = TrainerState(best_model_checkpoint=str(written), best_metric=0.5, best_global_step=2)
        _BestCheckpoint(checkpoint(tmp_path / "copy", 4), state.best_model_checkpoint).correct(state)
        return state.best_model_checkpoint, state.best_metric, state.best_global_step

    assert corrected() == (None, None, None)
    for folder in (written, copied):
        folder.mkdir(parents=True)
        assert corrected() == (str(folder), 0.5, 2)


def test_without_the_best_weights_the_numbers_are_those_of_the_weights_that_are_kept(
    files: Path, tmp_path: Path
) -> None:
    first = run(files, tmp_path / "run", max_steps=8)
    shutil.rmtree(checkpoint(tmp_path / "run", first.trainer.state.best_global_step))
    again = run(files, tmp_path / "run", "auto", max_steps=8)
    assert again.metrics["eval_loss"] != pytest.approx(first.metrics["eval_loss"])
    assert again.trainer.evaluate()["eval_loss"] == pytest.approx(again.metrics["eval_loss"], abs=1e-6)


def test_a_finished_run_that_keeps_its_last_weights_is_read_with_them(files: Path, tmp_path: Path) -> None:
    settings = {"load_best_model_at_end": False, "early_stopping_patience": 1}
    first = run(files, tmp_path / "run", **settings)
    again = run(files, tmp_path / "run", "auto", **settings)
    assert again.trainer.evaluate()["eval_loss"] == pytest.approx(first.metrics["eval_loss"], abs=1e-6)


def test_damage_and_other_settings_are_said(files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "run", max_steps=2)
    saved = checkpoint(tmp_path / "run", 2)

    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            run(files, tmp_path / "run", saved, max_steps=4, **settings)

    refused("had another optimizer", optimizer="sgd")
    for name in ("optimizer.pt", "model.safetensors"):
        whole = (saved / name).read_bytes()
        (saved / name).write_bytes(whole[:1000])
        refused(f"{name} is damaged or cut off")
        (saved / name).write_bytes(whole)
    (saved / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    refused("no state of the optimiser")
    (saved / "trainer_state.json").unlink()
    refused("holds no trainer_state.json")


def warnings_of(folder: Path) -> list[str]:
    path = folder / "sections.jsonl"
    sections = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [entry["message"] for entry in sections if entry.get("level") == "warning"]


@pytest.mark.parametrize(("change", "says"), [
    ({}, ""),
    ({"dataset": {"max_samples": 10}}, "the training rows are not those of the run that is resumed (16 then, 10 now)"),
    ({"batch_size": 4}, "a step of the run that is resumed had 2 rows, and has 4 now"),
    ({"batch_size": 1, "gradient_accumulation_steps": 2}, ""),
], ids=str)  # fmt: skip
def test_other_rows_than_before_are_named(files: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    settings: dict[str, Any] = {"learning_rate": 1e-3, "save_interval": 3, "eval_interval": 3}
    run(files, tmp_path / "out", max_steps=3, **settings)
    run(files, tmp_path / "out", resume=True, max_steps=4, **settings, **change)
    said = [line for line in warnings_of(tmp_path / "out") if "the run that is resumed" in line]
    assert len(said) == bool(says)
    assert all(says in line for line in said)


def test_what_provenance_does_not_say_is_no_difference(tmp_path: Path) -> None:
    def provenance(train: str | None, held_out: str = "x", rows: int = 5, **more: int) -> dict[str, Any]:
        sets = (("train", rows, train), ("eval", 3, held_out))
        return {"data": [{"role": role, "rows": count, "fingerprint": mark} for role, count, mark in sets], **more}

    file, now = tmp_path / "provenance.json", provenance("a", rows_per_step=2)
    assert other_rows(file, now) == []
    for then in (provenance("a", "y"), provenance(None), provenance("a", rows_per_step=2)):
        file.write_text(json.dumps(then))
        assert other_rows(file, now) == []
    file.write_text(json.dumps(provenance("b", rows=4, rows_per_step=3)))
    rows, step = other_rows(file, now)
    assert "(4 then, 5 now)" in rows
    assert "had 3 rows, and has 2 now" in step
    file.write_text("{")
    assert other_rows(file, now) == []


@pytest.mark.parametrize(("raised", "said"), [
    (ValueError("sizes"), r"its run trained other weights than this one \(sizes\)"), (ConfigError("own words"), "^own words$"),
])  # fmt: skip
def test_an_optimiser_that_cannot_be_read(raised: Exception, said: str) -> None:
    def read(_: Any) -> None:
        raise raised

    trainer = SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ConfigError, match=said):
        _read_optimizer(trainer, read, "checkpoint-2")


# Keeping --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("greater", "best", "value", "saves"), [
    (False, None, 9.0, True), (False, 2.0, 1.0, True), (False, 2.0, 2.0, False), (False, 2.0, 3.0, False),
    (True, None, -9.0, True), (True, 2.0, 3.0, True), (True, 2.0, 2.0, False), (True, 2.0, 1.0, False), (True, 0.0, -1.0, False),
])  # fmt: skip
def test_a_better_evaluation_is_saved(greater: bool, best: float | None, value: float, saves: bool) -> None:
    for name in ("f1", "eval_f1"):
        args = SimpleNamespace(metric_for_best_model=name, greater_is_better=greater)
        control = SimpleNamespace(should_save=False)
        SaveBest().on_evaluate(args, SimpleNamespace(best_metric=best), control, {"eval_f1": value, "eval_loss": 0.0})
        assert control.should_save is saves


def test_a_metric_that_is_not_computed_is_named() -> None:
    args = SimpleNamespace(metric_for_best_model=None, greater_is_better=False)
    with pytest.raises(ConfigError, match=r"eval_loss is not computed; the metrics are eval_f1$"):
        SaveBest().on_evaluate(args, SimpleNamespace(best_metric=None), None, {"eval_f1": 1.0, "epoch": 1.0})
