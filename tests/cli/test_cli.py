"""The shell's door: what it prints, its exit codes, and one whole run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from shell import aligntune


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path / "chats.jsonl", tiny.chats(16))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"algorithm: sft\nmodel: {{name_or_path: {tmp_path}/model, precision: fp32}}\ndataset: {{name: {tmp_path}/chats.jsonl}}\n"
        f"train: {{max_steps: 2}}\nlogging: {{output_dir: {tmp_path}/out}}\nevaluation: {{max_new_tokens: 4}}\n"
    )
    return path


def test_version_and_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    assert aligntune("--version").stdout.startswith("aligntune 0.")
    (tmp_path / "file").touch()
    refused = aligntune("config", "schema", "--output", tmp_path / "file" / "schema.json")
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr


def test_train_and_what_it_leaves(run_file: Path) -> None:
    out = run_file.parent / "out"
    done = aligntune("train", run_file, "learning_rate=1e-3", "--logging.log_interval", "1")
    assert done.returncode == 0, done.stderr
    assert f"model:  {out}/model" in done.stdout
    left = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert left >= {
        "config.yaml",
        "config.origins.json",
        "provenance.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "model",
        "report.html",
        "status.json",
    }
    assert {path.name for path in (out / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    }
    again = aligntune("train", out / "config.yaml")
    assert again.returncode == 2  # its results are not overwritten unasked
    assert "already holds a run" in again.stderr
    assert "--resume auto" in again.stderr
    assert "learning_rate: 0.001" in (out / "config.yaml").read_text()


def test_a_full_disk_is_told_without_traceback(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever meets it; and the folder that was begun is taken away."""
    base, output = run_file.parent / "model", run_file.parent / "full"

    def refuse(*_: object) -> None:
        assert list(output.parent.glob(".full.partial"))
        raise OSError(28, "No space left on device", "weights")

    monkeypatch.setattr("aligntune.models.use.save_model", refuse)
    done = aligntune("export", base, output)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aligntune: [Errno 28] No space left on device: 'weights'. Make room")
    assert not list(output.parent.glob("*full*"))
    elsewhere = aligntune("export", base, run_file / "folder")
    assert elsewhere.returncode == 2
    assert "cannot be written (Not a directory)" in elsewhere.stderr


def test_dry_run_writes_nothing(run_file: Path) -> None:
    done = aligntune("train", run_file, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "rows" in done.stdout
    assert not (run_file.parent / "out").exists()


def test_preview_marks_trained_tokens(run_file: Path) -> None:
    done = aligntune("data", "preview", run_file, "completion_only_loss=true", "--rows", "1")
    assert done.returncode == 0, done.stderr
    assert "assistant" in done.stdout


@pytest.mark.parametrize(("settings", "message"), [
    (["verifier=math_corectness"], "math_correctness"),
    (["evolved_params={lenght.max_length: [1, 5]}"], "train.evolved_params.lenght.max_length: say REWARD.PARAM with one of"),
    (["evolved_params={math_correctness.tolerance: [0, 1]}"], "math_correctness is the verifier, which does not evolve"),
])  # fmt: skip
def test_validate_reads_what_evolves(tmp_path: Path, settings: list[str], message: str) -> None:
    file = tmp_path / "es.yaml"
    file.write_text(
        "algorithm: meta_es\nmodel: m\ndataset: d\nrewards: [length, math_correctness]\ntrain: {verifier: math_correctness}\n"
    )
    assert aligntune("validate", file).returncode == 0
    done = aligntune("validate", file, *settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_and_explain(run_file: Path) -> None:
    assert "valid" in aligntune("validate", run_file).stdout
    shown = aligntune("explain", run_file, "--all", "epochs=7").stdout
    assert [line.split() for line in shown.splitlines() if line.startswith("train.epochs ")] == [
        ["train.epochs", "7", "override", "epochs=7"]
    ]
    line = next(line for line in shown.splitlines() if line.startswith("model.precision "))
    assert line.split()[1:] == ["fp32", f"{run_file}:2"]


def test_in_a_process_of_its_own(run_file: Path) -> None:
    """The installed module, started as a shell does: output, exit codes and no traceback."""
    start = [sys.executable, "-m", "aligntune.cli.main"]
    told = {
        "capture_output": True,
        "text": True,
        "timeout": 300,
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    }
    good = subprocess.run([*start, "validate", run_file], **told)  # type: ignore[call-overload]
    assert (good.returncode, good.stderr) == (0, "")
    assert "valid (sft, " in good.stdout
    assert " settings given, " in good.stdout
    bad = subprocess.run([*start, "validate", run_file, "lerning_rate=1"], **told)  # type: ignore[call-overload]
    assert bad.returncode == 2
    assert bad.stderr.startswith("aligntune: ")


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "nowhere.yaml"], "nowhere.yaml: no such config file"),
    (["train", "RUN", "lerning_rate=1"], "did you mean learning_rate"),
    (["train", "RUN", "model.name_or_path=/nowhere/model"], "no such folder"),
    (["train", "RUN", "dataset.name=nowhere.jsonl"], "nowhere.jsonl"),
    (["train", "RUN", "dataset.format_type=alpacca"], "alpaca"),
    (["train", "RUN", "messages_column=talk"], "talk"),
    (["train", "RUN", "output_dir=/proc/nope"], "/proc/nope"),
    (["train", "RUN", "epochs=0"], "greater than or equal to 1"),
    (["train", "RUN", "batch_size=2", "per_device_batch_size=3"], "keep one of"),
    (["train", "RUN", "loggers=[wandbb]"], "did you mean wandb"),
    (["train", "RUN", "attn_implementation=flash_attention_2"], "flash"),
    (["train", "RUN", "model.name_or_path=DATA"], "is a file"),
    (["validate"], "algorithm: is required"),
])  # fmt: skip
def test_mistakes_are_one_message_and_exit_code_2(run_file: Path, arguments: list[str], message: str) -> None:
    folder = run_file.parent
    words = [word.replace("RUN", str(run_file)).replace("DATA", str(folder / "chats.jsonl")) for word in arguments]
    done = aligntune(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25
    assert not (folder / "out" / "model").exists()
    assert not (folder / "out" / "metrics.jsonl").exists()
