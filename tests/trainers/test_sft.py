"""Supervised fine-tuning from rows to a saved model, on TRL and on our own trainer."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from aligntune.core.backend_factory import create_sft_trainer
from aligntune.errors import ConfigError, DataError, ModelError
from aligntune.models.save import merged
from aligntune.trainers import sft
from aligntune.trainers.answering import read_questions
from comparing import largest_difference, without_timing
from shell import aligntune, start

BACKENDS = ["trl", "native"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "train.jsonl", tiny.chats(32))
    tiny.write_rows(tmp_path / "eval.jsonl", tiny.chats(8, 100))
    return tmp_path


def trainer(files: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "model_name": files / "model", "dataset_name": files / "train.jsonl", "output_dir": files / "out", "precision": "fp32", "batch_size": 4,
        "learning_rate": 3e-3, "max_steps": 6, "log_interval": 1, "completion_only_loss": True, "loggers": "none",
        "evaluation": {"max_new_tokens": 4, "compute_rouge": False, "compute_bleu": False},
    }  # fmt: skip
    return create_sft_trainer(**(given | settings))


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_timing(row) for row in rows if row["split"] == split]


def losses(found: Any) -> list[float]:
    found.train(overwrite=True)
    return [row["loss"] for row in lines(found.directory.path) if "loss" in row]


@pytest.mark.adapter
@pytest.mark.parametrize("settings", [
    {}, {"use_peft": True, "lora_dropout": 0.0}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"assistant_only_loss": True},
    {"packing": True, "remove_unused_columns": True},
], ids=str)  # fmt: skip
def test_trl_and_native_train_alike(files: Path, settings: dict[str, Any]) -> None:
    one, other = (
        losses(trainer(files, backend=backend, output_dir=files / backend, **settings)) for backend in BACKENDS
    )
    assert one == pytest.approx(other, abs=1e-5)
    assert len(one) == 6


@pytest.mark.adapter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [
    {"batch_size": 1, "gradient_accumulation_steps": 4}, {"batch_size": 2, "gradient_accumulation_steps": 2}, {"padding_free": True},
    {"pad_to_multiple_of": 64}, {"attn_implementation": "eager"}, {"gradient_checkpointing": False},
], ids=str)  # fmt: skip
def test_the_loss_does_not_depend_on_how_a_batch_is_computed(
    files: Path, backend: str, settings: dict[str, Any]
) -> None:
    plain = losses(trainer(files, backend=backend, output_dir=files / "plain"))
    assert losses(trainer(files, backend=backend, **settings)) == pytest.approx(plain, abs=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_of_the_head_is_refused(files: Path, backend: str) -> None:
    with pytest.raises(ModelError, match="leave lm_head out of target_modules"):
        trainer(files, backend=backend, use_peft=True, target_modules=["lm_head"]).train()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_give_the_mean_loss_of_their_documents(files: Path, backend: str) -> None:
    """One step over all rows: packed by `bfd`, the loss is that of the padded batch."""
    settings = {"backend": backend, "max_steps": 1, "max_seq_length": 200, "dataset": {"max_samples": 8}}
    plain = losses(trainer(files, batch_size=8, **settings))
    packed = trainer(files, batch_size=8, packing=True, **settings)
    assert len(packed.train_rows) < 8
    assert losses(packed) == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_learns_to_repeat_the_last_word(files: Path, backend: str) -> None:
    """16 words: guessing is right once in 16. The rows repeat themselves, so the task can be learned by heart."""
    tiny.write_rows(files / "eval.jsonl", tiny.chats(16))
    found = trainer(
        files, backend=backend, max_steps=150, batch_size=8, learning_rate=1e-2, eval_dataset=str(files / "eval.jsonl"), log_interval=50,
        eval_interval=75,
    )  # fmt: skip
    before = found.evaluate()["eval_loss"]
    metrics = found.train()
    assert before > 5  # ln 259 = 5.56
    assert metrics["eval_loss"] < 1
    questions = tiny.chats(16)
    right = [
        said == row["messages"][1]["content"]
        for said, row in zip(found.predict([row["messages"][:1] for row in questions]), questions)
    ]
    assert sum(right) >= 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_saved_model_is_the_live_one_and_brings_what_generation_needs(files: Path, backend: str) -> None:
    found = trainer(files, backend=backend, chat_template="zephyr", dataset={"chat_template": "zephyr"})
    found.train()
    folder = files / "out" / "model"
    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert largest_difference(found.model.eval(), saved, torch.tensor([[5, 6, 7, 8]])) < 1e-5
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == found.tokenizer.chat_template
    assert "<|assistant|>" in again.chat_template
    assert saved.generation_config.eos_token_id == again.eos_token_id
    assert (saved.generation_config.pad_token_id, saved.dtype) == (again.pad_token_id, torch.float32)
    assert "Trained from" in (folder / "README.md").read_text()


def test_adapter_and_merged_weights(files: Path) -> None:
    from peft import PeftModel

    found = trainer(files, use_peft=True, learning_rate=1e-2)
    found.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    live = found.model.eval()
    base = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    assert largest_difference(live, base, ids) > 1e-3  # it moved
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(files / "model"), str(files / "out" / "model")
    ).eval()
    assert largest_difference(live, adapter, ids) < 1e-5
    whole = AutoModelForCausalLM.from_pretrained(found.save_model(files / "whole", merge=True)).eval()
    assert largest_difference(live, whole, ids) < 1e-5
    assert largest_difference(live, merged(live).eval(), ids) < 1e-5
    continued = trainer(
        files, model_name=files / "out" / "model", output_dir=files / "next"
    ).model  # an adapter as start
    assert largest_difference(continued.eval(), live, ids) < 1e-5


def test_a_lora_run_resumes_exactly(files: Path) -> None:
    settings = {"use_peft": True, "save_interval": 2, "max_steps": 6}
    whole = trainer(files, output_dir=files / "whole", **settings)
    whole.train()
    cut = trainer(files, output_dir=files / "cut", **settings)
    cut.train()
    checkpoint = files / "cut" / "checkpoints" / "checkpoint-2"
    again = trainer(files, output_dir=files / "cut", **settings)
    again.train(resume=str(checkpoint))
    assert lines(files / "cut") == lines(files / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_and_resumed_equals_uninterrupted(files: Path, backend: str) -> None:
    """kill -9 in mid-training, then `--resume auto`: the same metrics, line by line, and the same weights."""
    config = {
        "algorithm": "sft", "backend": backend, "model": {"name_or_path": str(files / "model"), "precision": "fp32"},
        "dataset": {"name": str(files / "train.jsonl")}, "eval_dataset": {"name": str(files / "eval.jsonl")},
        "train": {"max_steps": 24, "per_device_batch_size": 4, "learning_rate": 3e-3, "eval_interval": 8, "save_interval": 8},
        "evaluation": {"max_new_tokens": 4, "compute_rouge": False, "compute_bleu": False},
        "logging": {"log_interval": 3, "loggers": "none"},
    }  # fmt: skip
    file = files / "run.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML

    def command(name: str, *more: str) -> list[str]:
        return ["train", str(file), f"logging.output_dir={files / name}", *more]

    assert aligntune(*command("whole")).returncode == 0
    running = start(aligntune, *command("cut"))
    mark = files / "cut" / "checkpoints" / "checkpoint-8" / "aligntune.json"
    deadline = time.monotonic() + 120
    while not mark.exists() and running.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    running.join()
    assert running.exitcode == -signal.SIGKILL
    assert not (files / "cut" / "model").exists()
    assert aligntune(*command("cut", "--resume", "auto")).returncode == 0
    for split in ("train", "eval"):
        assert lines(files / "cut", split) == lines(files / "whole", split)
    one, other = (
        AutoModelForCausalLM.from_pretrained(files / name / "model").state_dict() for name in ("whole", "cut")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    statuses = [entry["outcome"] for entry in json.loads((files / "cut" / "status.json").read_text())["sessions"]]
    assert statuses == ["killed", "finished"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_evaluation_is_kept_and_training_stops_when_it_gets_worse(files: Path, backend: str) -> None:
    """A learning rate that overshoots: some evaluation in the middle is best, and its weights are the ones saved."""
    found = trainer(
        files, backend=backend, eval_dataset=str(files / "eval.jsonl"), max_steps=60, learning_rate=0.1, eval_interval=2, early_stopping_patience=3,
        lr_scheduler="constant", warmup_ratio=0.0, save_total_limit=2,
    )  # fmt: skip
    metrics = found.train()
    seen = {row["step"]: row["loss"] for row in lines(files / "out", "eval")}
    best = min(seen, key=lambda step: seen[step])
    last = max(seen)
    assert best < last < 60
    assert (last - best) == 6 or best == 0
    assert metrics["eval_loss"] == pytest.approx(seen[best], abs=1e-5)
    assert f"kept the weights of step {best}, the best by eval_loss" in (files / "out" / "report.html").read_text()
    again = create_sft_trainer(
        model_name=files / "out" / "model", dataset_name=files / "train.jsonl", eval_dataset=str(files / "eval.jsonl"), precision="fp32",
        completion_only_loss=True, output_dir=files / "x", backend=backend, evaluation={"compute_rouge": False, "compute_bleu": False},
    )  # fmt: skip
    assert again.evaluate()["eval_loss"] == pytest.approx(seen[best], abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perplexity_does_not_depend_on_batches_or_packing(files: Path, backend: str) -> None:
    found = {
        str(settings): trainer(files, backend=backend, eval_dataset=str(files / "eval.jsonl"), **settings).evaluate()["eval_perplexity"]
        for settings in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 8}, {"eval_packing": True, "packing": True}, {"eval_packing": True})
    }  # fmt: skip
    assert max(found.values()) == pytest.approx(min(found.values()), rel=1e-5)


@pytest.mark.parametrize("packs", [False, True])
def test_the_length_of_evaluation_rows_follows_their_own_packing(files: Path, packs: bool) -> None:
    """Pieces of one stream lose nothing; rows that are not packed are cut, also where the training rows are one stream."""
    common = {"eval_dataset": str(files / "eval.jsonl"), "completion_only_loss": False}
    settings = {"packing": not packs, "eval_packing": packs, "packing_strategy": "wrapped", "max_seq_length": 20}
    found = trainer(files, **common, **settings)
    whole = trainer(files, **common).eval_rows
    lengths = [len(row) for row in found.eval_rows["input_ids"]]
    assert max(lengths) == 20
    assert (sum(lengths) == sum(whole["length"])) is packs


@pytest.mark.adapter
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_is_trained_and_evaluated_on(files: Path, backend: str) -> None:
    """In the order of the file, into a second pass; its evaluation is that of the rows read whole."""
    common: dict[str, Any] = {
        "backend": backend,
        "batch_size": 3,
        "eval_interval": 6,
        "learning_rate": 1e-12,
        "max_steps": 12,
    }
    common["eval_dataset"] = {"name": str(files / "eval.jsonl")}
    whole = trainer(files, output_dir=files / "whole", **common)
    expected = whole.train()["eval_loss"]
    streamed = trainer(files, dataset={"streaming": True}, output_dir=files / "stream", **common)
    assert streamed.train()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    seen = [row["loss"] for row in lines(files / "stream") if "loss" in row]
    assert len(seen) == 12
    assert len(set(seen[:11])) == 11
    assert seen[11] == pytest.approx(seen[0], abs=1e-6)  # 32 rows are 11 batches, the last of 2


def test_dropping_the_last_batch_drops_no_evaluation_row(files: Path) -> None:
    common: dict[str, Any] = {"backend": "native", "batch_size": 3, "max_steps": 1, "eval_interval": 1}
    common["eval_dataset"] = {"name": str(files / "eval.jsonl")}
    one, other = (
        trainer(files, output_dir=files / str(drops), dataloader_drop_last=drops, **common).train()["eval_loss"]
        for drops in (False, True)
    )
    assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.adapter
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_like_length_come_in_an_order_of_the_data_seed(files: Path, backend: str) -> None:
    one, again, other = (
        losses(trainer(files, backend=backend, group_by_length=True, max_steps=2, seed=seed, data_seed=data_seed))
        for seed, data_seed in ((1, 5), (2, 5), (1, 6))
    )
    assert one == again
    assert one != other


def test_metrics_of_answers_and_the_best_by_one_of_them(files: Path) -> None:
    found = trainer(
        files,
        eval_dataset=str(files / "eval.jsonl"),
        evaluation={"max_new_tokens": 4},
        metric_for_best_model="eval_rougeL",
        eval_interval=3,
    )
    assert found.train().keys() >= {"eval_rouge1", "eval_rougeL", "eval_bleu", "eval_perplexity", "eval_loss"}
    assert found.config.train.greater_is_better is True
    with pytest.raises(ConfigError, match="did you mean eval_rougeL"):
        trainer(
            files,
            eval_dataset=str(files / "eval.jsonl"),
            evaluation={"max_new_tokens": 4},
            metric_for_best_model="eval_rougeLL",
            output_dir=files / "y",
        ).train()


def test_samples_before_and_after_are_written(files: Path) -> None:
    trainer(files).train()
    samples = [json.loads(line) for line in (files / "out" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 6}
    first = next(row for row in samples if row["step"] == 0)
    assert first["prompt"] == tiny.chats(1)[0]["messages"][:1]  # the answer is not in the prompt
    assert first["reference"] == tiny.chats(1)[0]["messages"][1]["content"]


def test_predict_takes_texts_and_messages(files: Path) -> None:
    found = trainer(files)
    one, same = found.predict(["say red", [{"role": "user", "content": "say red"}]])
    assert one == same


def test_predict_refuses_what_is_no_question() -> None:
    message = {"role": "user", "content": "say red"}
    assert read_questions("say red") == ["say red"]
    assert read_questions([[message], "say blue"]) == [[message], "say blue"]
    with pytest.raises(DataError, match="put the messages of one conversation into a list of their own"):
        read_questions([message])
    for wrong in (1, {"prompt": "say red"}, [], ["say red"]):
        with pytest.raises(DataError, match="should be a text, or a list of messages"):
            read_questions([wrong])


def test_nothing_to_evaluate_on(files: Path) -> None:
    with pytest.raises(ConfigError, match="eval_dataset or eval_split"):
        trainer(files).evaluate()


def test_no_data(files: Path) -> None:
    (files / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"none.jsonl"):
        trainer(files, dataset_name=files / "none.jsonl").train()
    assert not (files / "out" / "model").exists()


def test_push_to_hub_uploads_the_saved_folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> str:
            seen["repo"] = (repo_id, options)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, folder_path: str, repo_id: str) -> None:
            seen["files"] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert trainer(files).push_to_hub("me/mine") == "https://hub/me/mine"
    assert seen["repo"] == ("me/mine", {"private": True, "exist_ok": True})
    assert "model.safetensors" in seen["files"]


def test_a_batch_that_is_never_full_is_told_before_training(files: Path) -> None:
    for steps in (None, 2):
        session = trainer(
            files, backend="native", dataset={"max_samples": 3}, dataloader_drop_last=True, max_steps=steps
        )
        with pytest.raises(ConfigError, match="dataloader_drop_last: the 3 training rows do not fill one batch of 4"):
            session.train(overwrite=True)
    assert (
        trainer(
            files, dataloader_drop_last=True, dataset={"max_samples": 11}, epochs=1, max_steps=None
        ).optimizer_steps()
        == 2
    )


def test_one_chat_template_whichever_rows_are_read_first(files: Path) -> None:
    settings: dict[str, Any] = {
        "dataset": {"chat_template": "zephyr"},
        "eval_dataset": {"name": str(files / "eval.jsonl")},
    }
    first, later = trainer(files, **settings), trainer(files, **settings)
    rows = first.eval_rows["input_ids"][:]
    later.train_rows  # noqa: B018
    assert rows == later.eval_rows["input_ids"][:]
    assert "<|user|>" in first.tokenizer.decode(rows[0])
    mixture = [{"name": str(files / "train.jsonl"), "chat_template": name} for name in ("zephyr", "chatml")]
    with pytest.raises(ConfigError, match=r"chat_template: a run has one.*'zephyr', 'chatml'"):
        trainer(files, dataset_name=None, datasets=mixture).tokenizer  # noqa: B018


@pytest.mark.parametrize("rows", [2, 40])
def test_a_preview_tokenises_no_more_than_it_shows(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("aligntune.trainers.session.HEAD", 4)
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path))
    texts = [{"text": "" if at == 1 else f"{tiny.WORDS[at % 16]} {at}"} for at in range(60)]
    data = tiny.write_rows(tmp_path / "texts.jsonl", texts)
    session, whole = (
        create_sft_trainer(
            files / "model", data, output_dir=tmp_path / name, task_type="text_generation", loggers="none"
        )
        for name in ("a", "b")
    )
    read: list[int] = []
    tokenise = sft.tokenize_sft
    monkeypatch.setattr(sft, "tokenize_sft", lambda raw, *a, **k: read.append(len(raw)) or tokenise(raw, *a, **k))
    shown = session.preview(rows)
    assert read == ([4] if rows == 2 else [60])
    whole.train_rows  # noqa: B018
    assert shown == whole.preview(rows)
    assert len(session.train_rows) == 59
