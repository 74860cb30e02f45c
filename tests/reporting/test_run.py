"""Run directories: nothing is lost by accident, nothing half-written passes as a result, a resumed trail is exact."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aligntune.errors import ConfigError
from aligntune.reporting.run import RunDirectory, checkpoint_step
from aligntune.reporting.trail import JsonLines, clean, write_atomic


def log(run, *steps, split="train"):
    for step in steps:
        run.metrics.append({"step": step, "split": split, "loss": 1 / step})


def steps(run):
    return [row["step"] for row in run.metrics.rows()]


def checkpoint(run, step, mark=True):
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if mark:
        run.mark_checkpoint(folder, step)
    return folder


class TestTrail:
    def test_a_torn_last_line_is_skipped_and_then_removed(self, tmp_path):
        lines = JsonLines(tmp_path / "m.jsonl")
        lines.append({"step": 1})
        lines.close()
        with lines.path.open("ab") as file:
            file.write(b'{"step": 2, "lo')
        assert lines.rows() == [{"step": 1}]
        lines.append({"step": 3})
        assert lines.path.read_text() == '{"step": 1}\n{"step": 3}\n'

    def test_a_file_with_only_a_torn_line_becomes_empty(self, tmp_path):
        lines = JsonLines(tmp_path / "m.jsonl")
        lines.path.write_bytes(b'{"st')
        lines.append({"a": 1})
        assert lines.path.read_text() == '{"a": 1}\n'

    def test_a_line_is_readable_before_the_file_is_closed(self, tmp_path):
        lines = JsonLines(tmp_path / "m.jsonl")
        lines.append({"step": 1})
        assert JsonLines(lines.path).rows() == [{"step": 1}]

    def test_a_damaged_line_is_named(self, tmp_path):
        (tmp_path / "m.jsonl").write_text('{"step": 1}\nnot json\n')
        with pytest.raises(ValueError, match=r"m\.jsonl:2 is not JSON"):
            JsonLines(tmp_path / "m.jsonl").rows()

    def test_json_is_strict_and_keeps_every_digit(self):
        numpy = pytest.importorskip("numpy")
        value = {
            "nan": float("nan"),
            "inf": float("inf"),
            "x": 0.1 + 0.2,
            "n": numpy.float32(0.5),
            "a": numpy.arange(2),
        }
        assert clean(value) == {"nan": None, "inf": None, "x": 0.30000000000000004, "n": 0.5, "a": [0, 1]}
        assert clean(Path("a")) == "a"

    def test_an_atomic_write_that_fails_leaves_the_old_file(self, tmp_path, monkeypatch):
        target = tmp_path / "a.json"
        write_atomic(target, "old")

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="No space"):
            write_atomic(target, "new")
        assert target.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_a_session_that_cannot_begin_is_told_and_holds_nothing(self, tmp_path, monkeypatch):
        run = RunDirectory.create(tmp_path)
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(ConfigError, match=r"status.json: No space left on device; choose"), run.session():
                pass
        with run.session():
            assert run.outcome() == "running"


class TestCreate:
    def test_a_new_run_resumes_nothing(self, tmp_path):
        run = RunDirectory.create(tmp_path / "a" / "b")
        assert run.path.is_dir()
        assert run.resumed_from == 0

    def test_results_are_not_replaced_by_accident(self, tmp_path):
        log(RunDirectory.create(tmp_path), 1)
        with pytest.raises(ConfigError, match=r"already holds a run.*resume.*overwrite.*another output_dir"):
            RunDirectory.create(tmp_path)
        assert steps(RunDirectory(tmp_path)) == [1]

    def test_a_run_that_left_nothing_is_replaced(self, tmp_path):
        with pytest.raises(RuntimeError), RunDirectory.create(tmp_path).session():
            raise RuntimeError
        assert RunDirectory.create(tmp_path).metrics.rows() == []

    def test_overwrite_removes_the_runs_files_and_no_others(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        log(run, 1)
        run.write_text("config.yaml", "a: 1")
        checkpoint(run, 1)
        (tmp_path / "thesis.tex").write_text("mine")
        RunDirectory.create(tmp_path, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]

    def test_a_disk_that_refuses_is_an_error_that_says_what_to_do(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="choose an output_dir that you may write to"):
            RunDirectory.create(tmp_path / "file" / "run")

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot write"):
            RunDirectory.create(tmp_path / "file")


class TestResume:
    def test_what_is_no_checkpoint_is_said_first(self, tmp_path):
        run = RunDirectory.create(tmp_path / "run")
        log(run, 1)
        latest = checkpoint(run, 1)
        for given in (tmp_path / "nowhere", run.path):
            with pytest.raises(ConfigError, match=f"{given} is not a checkpoint folder; give a folder such as"):
                RunDirectory.create(run.path, resume=given)
        with pytest.raises(ConfigError, match=f"such as {latest}"):
            RunDirectory.create(tmp_path / "other", resume=run.path)
        assert steps(RunDirectory(run.path)) == [1]

    def test_lines_after_the_checkpoint_are_dropped_to_the_byte(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        log(run, 1, 2)
        log(run, 2, split="eval")
        run.samples.append({"step": 2, "prompt": "p", "completion": "kept"})
        folder = checkpoint(run, 2)
        whole = run.metrics.path.read_bytes()
        log(run, 2, split="final")  # same step, but after the save: a resumed run will write it again
        log(run, 3, 4)
        run.samples.append({"step": 4, "prompt": "p", "completion": "dropped"})
        again = RunDirectory.create(tmp_path, resume=folder)
        assert again.resumed_from == 2
        assert again.metrics.path.read_bytes() == whole
        assert [row["completion"] for row in again.samples.rows()] == ["kept"]

    def test_without_a_mark_lines_are_dropped_by_step(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        log(run, 1, 2, 3)
        folder = checkpoint(run, 2, mark=False)
        assert steps(RunDirectory.create(tmp_path, resume=folder)) == [1, 2]

    def test_resume_by_step_number(self, tmp_path):
        log(RunDirectory.create(tmp_path), 1, 2, 3)
        assert steps(RunDirectory.create(tmp_path, resume=1)) == [1]

    def test_resume_from_step_zero_starts_again(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        run.metrics.append({"step": 0, "split": "eval", "loss": 2.0})
        assert RunDirectory.create(tmp_path, resume=0).metrics.rows() == []

    def test_checkpoints_of_the_abandoned_future_lose_their_mark(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        log(run, 1)
        early = checkpoint(run, 1)
        log(run, 2)
        checkpoint(run, 2)
        RunDirectory.create(tmp_path, resume=early)
        assert RunDirectory(tmp_path).latest_checkpoint() == early

    def test_a_checkpoint_of_another_run_brings_its_step_and_no_trail(self, tmp_path):
        other = RunDirectory.create(tmp_path / "other")
        log(other, 1, 2)
        folder = checkpoint(other, 2)
        run = RunDirectory.create(tmp_path / "new", resume=folder)
        assert run.resumed_from == 2
        assert run.metrics.rows() == []
        assert steps(other) == [1, 2]

    def test_a_folder_that_is_no_checkpoint(self, tmp_path):
        with pytest.raises(ConfigError, match="not a checkpoint folder"):
            checkpoint_step(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match=r"no trainer_state\.json"):
            checkpoint_step(tmp_path / "empty")


class TestCheckpoints:
    def test_the_newest_marked_one_is_taken_in_numeric_order(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        checkpoint(run, 9)
        newest = checkpoint(run, 10)
        checkpoint(run, 11, mark=False)  # killed while it was written
        assert run.latest_checkpoint() == newest

    def test_without_marks_a_whole_state_file_counts(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        whole, torn = checkpoint(run, 5, mark=False), checkpoint(run, 6, mark=False)
        (whole / "trainer_state.json").write_text('{"global_step": 5}')
        (torn / "trainer_state.json").write_text('{"global_st')
        assert run.latest_checkpoint() == whole
        assert checkpoint_step(whole) == 5

    def test_none(self, tmp_path):
        assert RunDirectory.create(tmp_path).latest_checkpoint() is None


class TestSessions:
    def test_finished(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        with run.session():
            assert run.outcome() == "running"
        assert run.outcome() == "finished"
        (session,) = run.read_status()["sessions"]
        assert session["from_step"] == 0
        assert session["ended"] >= session["started"]

    def test_failed_with_the_error(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        with pytest.raises(RuntimeError), run.session():
            raise RuntimeError("out of memory")
        assert run.outcome() == "failed"
        error = run.read_status()["error"]
        assert (error["type"], error["message"]) == ("RuntimeError", "out of memory")
        assert "test_run.py" in error["traceback"]

    def test_a_users_mistake_has_no_traceback(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        with pytest.raises(ConfigError), run.session():
            raise ConfigError("beta must be positive")
        assert "traceback" not in run.read_status()["error"]

    def test_interrupted(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        with pytest.raises(KeyboardInterrupt), run.session():
            raise KeyboardInterrupt
        assert run.outcome() == "interrupted"

    def test_killed_while_another_process_watches(self, tmp_path):
        code = (
            "import sys, time\nfrom aligntune.reporting.run import RunDirectory\n"
            "run = RunDirectory.create(sys.argv[1])\n"
            "with run.session():\n    run.metrics.append({'step': 1})\n    print('ready', flush=True)\n    time.sleep(60)\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        try:
            assert child.stdout.readline() == "ready\n"
            run = RunDirectory(tmp_path)
            assert run.outcome() == "running"
            with pytest.raises(ConfigError, match="being written by another run"):
                RunDirectory.create(tmp_path, resume=0)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
        assert run.outcome() == "killed"
        again = RunDirectory.create(tmp_path, resume=1)
        with again.session():
            pass
        assert [session["outcome"] for session in again.read_status()["sessions"]] == ["killed", "finished"]
        assert again.read_status()["sessions"][1]["from_step"] == 1

    def test_one_session_at_a_time_in_a_process(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        with run.session(), pytest.raises(ConfigError, match="another run"):
            RunDirectory.create(tmp_path, overwrite=True)


class TestStaged:
    def test_a_folder_takes_its_name_only_when_whole(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        with run.staged("model") as folder:
            (folder / "weights").write_text("new")
            assert not run.model.exists()
        assert (run.model / "weights").read_text() == "new"

    def test_a_failure_keeps_the_earlier_folder(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        run.model.mkdir()
        (run.model / "weights").write_text("old")

        def save():
            with run.staged("model") as folder:
                (folder / "weights").write_text("half")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            save()
        assert (run.model / "weights").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_write_json_is_readable_and_whole(tmp_path):
    path = RunDirectory.create(tmp_path).write_json("provenance.json", {"ü": [1, float("nan")]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ü": [1, None]}


def test_reporting_needs_no_heavy_package():
    code = "import sys, aligntune.reporting; print([m for m in ('torch', 'transformers', 'datasets', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
