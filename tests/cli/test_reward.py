"""`aligntune reward`: what each verb prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import shell
import tiny
from aligntune.cli.reward import _is_model
from shell import Done


def aligntune(*arguments: object) -> Done:
    return shell.aligntune("reward", *arguments)


def test_gold_answers_pass_and_wrong_ones_do_not(tmp_path: Path) -> None:
    good = [{"prompt": f"{n}+1", "completion": f"#### {n + 1}", "answer": str(n + 1)} for n in range(8)]
    bad = [row | {"completion": "#### 99"} for row in good]
    passed = aligntune("test", "gsm8k", tiny.write_rows(tmp_path / "good.jsonl", good))
    failed = aligntune("test", "gsm8k", tiny.write_rows(tmp_path / "bad.jsonl", bad))
    assert (passed.returncode, failed.returncode) == (0, 1), passed.stderr + failed.stderr
    assert "gsm8k: passed" in passed.stdout
    assert "gsm8k: FAILED" in failed.stdout
    missing = aligntune("test", "gsm8k", tmp_path / "good.jsonl", "--gold", "nothing")
    assert missing.returncode == 2
    assert "no column 'nothing'" in missing.stderr


def test_train_on_pairs_then_score(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "base")
    rows = [{"prompt": "say", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(16)]
    data = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    done = aligntune(
        "train", "--pairs", data, "--base", tmp_path / "base", "--output", tmp_path / "out",
        "--eval-interval", 1, "--held-out", 0.25, "--best-metric", "accuracy",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "held_out_rows 4" in done.stdout
    assert done.stdout.count("eval at step") == 3  # before, after each of two steps
    assert "best by accuracy" in done.stdout
    assert f"model: {tmp_path}/out/model" in done.stdout
    out = tmp_path / "scores.jsonl"
    scored = aligntune("score", tmp_path / "out", data, "--completion", "chosen", "--output", out)
    assert scored.returncode == 0, scored.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 16
    assert all(isinstance(line["score"], float) for line in lines)


def test_train_on_texts_and_what_it_refuses(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "base")
    content = {
        "base_model_name": str(tmp_path / "base"), "training_texts": ["word " * n for n in range(1, 13)],
        "reward_functions": ["length"], "output_dir": str(tmp_path / "out"), "num_epochs": 1,
    }  # fmt: skip
    file = tmp_path / "reward.yaml"
    file.write_text(json.dumps({"reward_training": content | {"reward_functions": ["brevity"]}}))
    mixed = aligntune("train", file, "--epochs", "2")
    assert mixed.returncode == 2
    assert "--epochs is for --pairs" in mixed.stderr
    file.write_text(json.dumps({"reward_training": content | {"training_texts": ["one"]}}))
    few = aligntune("train", file)
    assert few.returncode == 2
    assert "training_texts" in few.stderr


def test_one_reward_in_full() -> None:
    shown = aligntune("list", "gsm8k").stdout
    for part in (
        "gsm8k (defined, 0 to 1)", "1 if the number after the last ####", "source: Cobbe et al. 2021", "columns: answer",
        "strict = True", "good:\n  scores 1\n", "bad:\n  scores 0\n", "adversarial:\n  scores 0  (the right number",
        "completion: #### 24", "column answer: '#### 72'",
    ):  # fmt: skip
        assert part in shown, part
    unknown = aligntune("list", "gms8k")
    assert unknown.returncode == 2
    assert "did you mean gsm8k?" in unknown.stderr


def test_files_that_cannot_be_used_are_named_before_anything_is_scored(tmp_path: Path) -> None:
    data = tiny.write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
    )
    file = tmp_path / "rewards.yaml"
    missing = aligntune("score", file, data)
    said = [(missing, "No such file")]
    for content, message in (
        ("rewards: [", "is not YAML"),
        ("a: 1", "has no list of rewards"),
        ("", "has no list of rewards"),
    ):
        file.write_text(content)
        said.append((aligntune("test", file, data), message))
    said.append((aligntune("score", "length", data, "--output", data / "below" / "out.jsonl"), "--output"))
    for done, message in said:
        assert (done.returncode, message in done.stderr) == (2, True), (message, done.stderr)
    made = tmp_path / "new" / "out.jsonl"
    assert aligntune("score", "length", data, "--output", made).returncode == 0
    assert len(made.read_text().splitlines()) == 2


def test_validate_knows_the_rewards(tmp_path: Path) -> None:
    run = {
        "algorithm": "grpo",
        "model": {"name_or_path": "m"},
        "dataset": {"name": "d"},
        "rewards": [{"type": "lenght"}],
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run))
    found = shell.aligntune("validate", file)
    assert found.returncode == 2
    assert "did you mean length?" in found.stderr


def test_validate_names_every_wrong_reward_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "algorithm: grpo\nmodel: {name_or_path: m}\ndataset: {name: d}\nrewards:\n"
        "  - {type: lenght}\n  - {type: length}\n  - {type: length, params: {maximum: 3}}\n"
    )
    found = shell.aligntune("validate", file)
    assert found.returncode == 2
    assert f"{file}:5: unknown reward 'lenght'" in found.stderr
    assert f"{file}:7: reward 'length' has no param 'maximum'" in found.stderr


def test_the_folder_of_a_run_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (("judge/model", "adapter_config.json"), ("plain", "config.json"), ("length", "notes.txt")):
        Path(folder).mkdir(parents=True)
        (Path(folder) / file).write_text("{}")
    assert [_is_model(name) for name in ("judge", "plain", "length", "brevity")] == [True, True, False, False]
