"""The recorder and where its events go."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from aligntune.errors import ConfigError, MissingExtra
from aligntune.reporting import Recorder, RunDirectory, Sink, recording, sections
from aligntune.reporting.events import TrailSink
from aligntune.reporting.sinks import check_loggers, logger_names, open_loggers


class Listener(Sink):
    def __init__(self):
        self.heard = []

    def metrics(self, step, values, split):
        self.heard.append(("metrics", step, dict(values), split))

    def note(self, step, message, level):
        self.heard.append(("note", step, message, level))


class Broken(Listener):
    name = "broken"

    def metrics(self, step, values, split):
        raise ConnectionError("server away")


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path)


class TestRecorder:
    def test_rows_of_the_trail(self, run):
        recorder = Recorder([TrailSink(run)])
        recorder.metrics(10, {"loss": 1.5, "bad": math.inf})
        recorder.metrics(10, {"accuracy": 0.5}, split="eval")
        recorder.sample(10, {"prompt": "2+2", "completion": "4"})
        recorder.close()
        assert run.metrics.rows() == [
            {"step": 10, "split": "train", "loss": 1.5, "bad": None},
            {"step": 10, "split": "eval", "accuracy": 0.5},
        ]
        assert run.samples.rows() == [{"step": 10, "prompt": "2+2", "completion": "4"}]

    def test_torch_and_numpy_scalars_are_numbers(self, run):
        torch = pytest.importorskip("torch")
        numpy = pytest.importorskip("numpy")
        listener = Listener()
        Recorder([listener]).metrics(1, {"a": torch.tensor(0.5), "b": numpy.float32(2), "c": None})
        assert listener.heard[0][2] == {"a": 0.5, "b": 2.0, "c": None}

    def test_the_first_nan_of_each_metric_is_a_warning(self):
        listener = Listener()
        recorder = Recorder([listener])
        for step in (1, 2):
            recorder.metrics(step, {"loss": math.nan})
        assert [event for event in listener.heard if event[0] == "note"] == [
            ("note", 1, "train loss is nan at step 1", "warning")
        ]

    def test_reserved_names(self):
        with pytest.raises(ValueError, match="'step' is a column"):
            Recorder().metrics(1, {"step": 2})

    def test_a_note_is_said_once_also_over_a_resume(self, run):
        for _ in range(2):
            recorder = Recorder([TrailSink(run)])
            recorder.note("no eval split", level="warning")
            recorder.note("no eval split", level="warning")
            recorder.close()
        assert [row["message"] for row in run.sections.rows()] == ["no eval split"]

    def test_an_optional_sink_that_fails_is_switched_off(self):
        listener, broken = Listener(), Broken()
        recorder = Recorder([listener, broken])
        recorder.metrics(1, {"loss": 1.0})
        recorder.metrics(2, {"loss": 0.5})
        notes = [event for event in listener.heard if event[0] == "note"]
        assert notes == [("note", 1, "the logger 'broken' failed and is switched off: server away", "warning")]
        assert sum(event[0] == "metrics" for event in listener.heard) == 2

    def test_a_trail_that_fails_ends_the_run(self, run):
        run.metrics.path.mkdir()
        with pytest.raises(ConfigError, match="cannot write"):
            Recorder([TrailSink(run)]).metrics(1, {"loss": 1.0})


class TestSections:
    def test_every_kind_goes_through_the_trail(self, run):
        recorder = Recorder([TrailSink(run)])
        payloads = {
            "table": sections.table(["a"], [[1]]),
            "series": sections.series([sections.curve("f", [0, 1], [1, None], low=[0, 0], high=[2, 2])]),
            "bars": sections.bars(["a"], [1.0]),
            "matrix": sections.matrix([[1]], ["a"], ["b"]),
            "text": sections.text("hello"),
            "samples": sections.samples([{"prompt": "p"}]),
        }
        assert set(payloads) == set(sections.KINDS)
        for kind, payload in payloads.items():
            recorder.section(kind, kind, payload, group="All", step=3)
        rows = run.sections.rows()
        assert [(row["kind"], row["step"], row["group"]) for row in rows] == [(kind, 3, "All") for kind in payloads]
        assert rows[1]["payload"]["curves"][0]["y"] == [1, None]

    @pytest.mark.parametrize(
        ("kind", "payload", "message"),
        [
            ("pie", {}, "unknown section kind 'pie'"),
            ("table", {"columns": ["a", "b"], "rows": [[1]]}, "one length: columns has 2, row 0 has 1"),
            ("series", {"curves": [{"name": "f", "x": [1], "y": [1, 2]}]}, "x has 1, y has 2"),
            ("matrix", {"values": [[1, 2]], "rows": ["a"], "columns": ["a"]}, "columns has 1, row 0 has 2"),
            ("bars", {"labels": ["a"], "values": {"f": []}}, "labels has 1, group f has 0"),
            ("text", {"words": "x"}, "cannot be made from"),
        ],
    )
    def test_a_payload_of_another_shape_is_refused(self, kind, payload, message):
        with pytest.raises(ValueError, match=message):
            Recorder().section(kind, "t", payload)


class TestLoggerNames:
    @pytest.mark.parametrize(
        ("given", "names"),
        [("none", []), ([], []), ("wandb", ["wandb"]), (["TensorBoard", "wandb", "wandb"], ["tensorboard", "wandb"])],
    )
    def test_names(self, given, names):
        assert logger_names(given) == names

    def test_all_means_what_is_installed(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "mlflow" else None)
        assert logger_names("all") == ["mlflow"]

    def test_a_typo_gets_a_suggestion(self):
        with pytest.raises(ConfigError, match="unknown logger 'wanb': did you mean wandb"):
            logger_names(["wanb"])
        with pytest.raises(ConfigError, match="choose from tensorboard, wandb, trackio, mlflow"):
            logger_names("zzz")

    def test_an_asked_logger_that_is_missing_is_an_error_and_a_default_one_is_not(self, monkeypatch, run, caplog):
        monkeypatch.setitem(sys.modules, "trackio", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match=r"aligntune\[trackio\]"):
            check_loggers(["trackio"], explicit=True)
        check_loggers(["trackio"], explicit=False)
        with caplog.at_level("INFO", logger="aligntune"):
            assert open_loggers(["trackio"], explicit=False, run=run) == []
        assert len(caplog.records) == 1
        assert "trackio is not installed" in caplog.text


class Calls(ModuleType):
    """A module that remembers every call to it and to what it returned."""

    def __init__(self, name, **attributes):
        super().__init__(name)
        self.calls = []
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def drive(name, run, monkeypatch, module):
    monkeypatch.setitem(sys.modules, name, module)
    (sink,) = open_loggers([name], explicit=True, run=run, run_name="trial", project="p", config={"lr": 0.1})
    recorder = Recorder([sink])
    recorder.metrics(5, {"loss": 2.0, "bad": math.nan, "note": "text"})
    recorder.sample(5, {"prompt": "a", "completion": "b", "rewards": {"x": 1.0}})
    recorder.sample(5, {"prompt": "c", "completion": "d"})
    recorder.metrics(5, {"pass@1": 0.25}, split="eval")
    recorder.close()
    return module


SAMPLES = {"columns": ["prompt", "completion", "rewards"], "data": [["a", "b", '{"x": 1.0}'], ["c", "d", ""]]}


class TestLoggers:
    def test_wandb(self, run, monkeypatch):
        module = drive("wandb", run, monkeypatch, Calls("wandb", id="abc"))
        ((_, init),) = module.named("init")
        assert (init["project"], init["name"], init["id"], init["resume"]) == ("p", "trial", None, "allow")
        assert init["config"] == {"lr": 0.1}
        logged = [args[0] for args, _ in module.named("log")]
        assert logged[0] == {"train/loss": 2.0, "step": 5}
        assert logged[1]["step"] == 5
        assert logged[2] == {"eval/pass@1": 0.25, "step": 5}
        assert module.named("Table") == [((), SAMPLES)]
        assert module.named("finish") == [((), {"exit_code": 0})]
        assert ((("*",), {"step_metric": "step"})) in module.named("define_metric")

    def test_wandb_continues_the_same_run_after_a_resume(self, run, monkeypatch):
        drive("wandb", run, monkeypatch, Calls("wandb", id="abc"))
        again = RunDirectory.create(run.path, resume=5)
        module = drive("wandb", again, monkeypatch, Calls("wandb", id="abc"))
        assert module.named("init")[0][1]["id"] == "abc"

    def test_trackio(self, run, monkeypatch):
        module = drive("trackio", run, monkeypatch, Calls("trackio"))
        ((_, init),) = module.named("init")
        assert init["resume"] == "never"
        assert init["name"].startswith("trial-")
        assert module.named("log")[0] == (({"train/loss": 2.0},), {"step": 5})
        assert module.named("Table") == [((), SAMPLES)]
        again = RunDirectory.create(run.path, resume=5)
        ((_, resumed),) = drive("trackio", again, monkeypatch, Calls("trackio")).named("init")
        assert (resumed["resume"], resumed["name"]) == ("allow", init["name"])

    def test_mlflow(self, run, monkeypatch):
        module = drive("mlflow", run, monkeypatch, Calls("mlflow", info=SimpleNamespace(run_id="r1")))
        assert module.named("set_experiment") == [(("p",), {})]
        assert module.named("start_run") == [((), {"run_id": None, "run_name": "trial"})]
        assert module.named("log_metrics") == [
            (({"train/loss": 2.0},), {"step": 5}),
            (({"eval/pass_1": 0.25},), {"step": 5}),
        ]
        (_, ((text, name), _)) = module.named("log_text")
        assert name == "samples/step_0000005.jsonl"
        assert [json.loads(line)["prompt"] for line in text.splitlines()] == ["a", "c"]
        assert module.named("end_run") == [((), {"status": "FINISHED"})]

    def test_trackers_hear_of_a_failure(self, run, monkeypatch):
        module = Calls("wandb", id="abc")
        monkeypatch.setitem(sys.modules, "wandb", module)
        recorder = Recorder(open_loggers("wandb", explicit=True, run=run))

        def train():
            try:
                raise RuntimeError
            finally:
                recorder.close()

        with pytest.raises(RuntimeError):
            train()
        assert module.named("finish") == [((), {"exit_code": 1})]

    def test_tensorboard_for_real(self, run):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (sink,) = open_loggers("tensorboard", explicit=True, run=run)
        recorder = Recorder([sink])
        for step in (1, 2, 3):
            recorder.metrics(step, {"loss": 1 / step})
        recorder.sample(3, {"prompt": "a", "completion": "b"})
        recorder.close()
        again = RunDirectory.create(run.path, resume=2)
        recorder = Recorder(open_loggers("tensorboard", explicit=True, run=again))
        recorder.metrics(3, {"loss": 9.0})
        recorder.close()
        events = EventAccumulator(str(run.path / "tensorboard"))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]
        assert "samples/0/text_summary" in events.Tags()["tensors"]


class TestRecording:
    def test_a_whole_session(self, tmp_path, capsys):
        with recording(tmp_path / "out", loggers=[]) as (run, recorder):
            recorder.metrics(1, {"loss": 1.0})
        assert run.outcome() == "finished"
        assert run.report.exists()
        assert "step 1  loss 1" in capsys.readouterr().out

    def test_an_error_is_recorded_and_has_its_page(self, tmp_path):
        with pytest.raises(RuntimeError), recording(tmp_path / "out") as (run, _recorder):
            raise RuntimeError("out of <memory>")
        assert run.outcome() == "failed"
        assert "out of &lt;memory&gt;" in run.report.read_text(encoding="utf-8")

    def test_a_missing_logger_writes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(MissingExtra), recording(tmp_path / "out", loggers=["wandb"]):
            pass
        assert not (tmp_path / "out").exists()

    def test_a_refusal_leaves_the_other_run_as_it_was(self, tmp_path):
        with recording(tmp_path) as (run, recorder):
            recorder.metrics(1, {"loss": 1.0})
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match="already holds a run"), recording(tmp_path):
            pass
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
            **before,
            "report.html": run.report.read_bytes(),
        }

    def test_other_ranks_touch_nothing(self, tmp_path):
        with recording(tmp_path / "out", rank=1) as (_, recorder):
            recorder.metrics(1, {"loss": 1.0})
        assert not (tmp_path / "out").exists()
