"""What a person sees: plain lines without escape codes, or a live bar."""

import logging
from io import StringIO

import pytest
from rich.console import Console

from aligntune.errors import ConfigError
from aligntune.reporting import Recorder
from aligntune.reporting.console import LiveConsole, PlainConsole, open_console, shown_values
from aligntune.reporting.text import duration, is_timing, label, metric, number, short, value_text
from comparing import without_timing

LOGS = {
    "loss": 1.23456,
    "learning_rate": 2e-5,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "memory_gib": 3.14159,
    "epoch": 0.5,
    "internal": 7.0,
}


@pytest.fixture
def plain():
    stream = StringIO()
    sink = open_console(stream=stream)
    yield Recorder([sink]), stream
    sink.close()


@pytest.fixture
def live():
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system="truecolor")
    sink = open_console(console=console, title="sft")
    yield Recorder([sink]), stream
    sink.close()


class TestPlain:
    def test_a_training_line(self, plain):
        recorder, stream = plain
        recorder.progress(0, 300)
        recorder.metrics(120, LOGS)
        assert stream.getvalue() == (
            "step 120/300  epoch 0.500  loss 1.235  lr 2e-5  grad 0.500  tok/s 12.3k  mem 3.14 GiB\n"
        )

    def test_the_time_left_is_of_this_sessions_pace(self, plain, monkeypatch):
        recorder, stream = plain
        clock = iter([100.0, 110.0])
        monkeypatch.setattr("aligntune.reporting.console.time.monotonic", lambda: next(clock))
        recorder.progress(50, 100)  # resumed at step 50, 100 s
        recorder.progress(60, 100)  # ten steps in ten seconds: forty steps are forty seconds
        recorder.metrics(60, {"loss": 1.0})
        assert stream.getvalue() == "step 60/100  loss 1  left 40s\n"

    def test_an_evaluation_line_shows_its_metrics(self, plain):
        recorder, stream = plain
        recorder.metrics(100, {"loss": 0.5, "pass@1": 0.25, "samples_per_second": 9.0, "epoch": 1.0}, split="eval")
        assert stream.getvalue() == "eval at step 100  loss 0.5000  pass@1 0.2500\n"

    def test_no_escape_codes_and_no_markup(self, plain):
        recorder, stream = plain
        recorder.note("column [bold]x[/bold] is empty", level="warning")
        assert stream.getvalue() == "warning: column [bold]x[/bold] is empty\n"

    def test_package_logs_pass_through(self, plain):
        _, stream = plain
        logging.getLogger("aligntune.data").warning("dropped %d rows", 3)
        logging.getLogger("aligntune.data").debug("not shown")
        assert stream.getvalue() == "warning: dropped 3 rows\n"

    def test_level_warning_shows_warnings_only(self):
        stream = StringIO()
        sink = open_console("warning", stream=stream)
        recorder = Recorder([sink])
        recorder.metrics(1, LOGS)
        recorder.note("fine")
        logging.getLogger("aligntune.x").info("fine too")
        recorder.note("look", level="warning")
        recorder.close()
        assert stream.getvalue() == "warning: look\n"

    def test_closing_gives_the_package_logger_back(self):
        logger = logging.getLogger("aligntune")
        before = (logger.level, logger.propagate, list(logger.handlers))
        open_console(stream=StringIO()).close()
        assert (logger.level, logger.propagate, list(logger.handlers)) == before

    def test_unknown_level(self):
        with pytest.raises(ConfigError, match="unknown log_level 'LOUD': choose from DEBUG, INFO"):
            open_console("LOUD")


class TestLive:
    def test_it_is_chosen_on_a_terminal_only(self, monkeypatch):
        terminal = Console(file=StringIO(), force_terminal=True)
        for console, kind in ((terminal, LiveConsole), (Console(file=StringIO()), PlainConsole)):
            sink = open_console(console=console)
            sink.close()
            assert type(sink) is kind

    def test_the_bar_ends_with_the_last_numbers(self, live):
        recorder, stream = live
        recorder.progress(0, 300)
        recorder.metrics(150, LOGS)
        recorder.progress(150, 300)
        recorder.close()
        last = stream.getvalue()
        text = Console(file=StringIO(), width=120)
        assert "\x1b[" in last
        plain = text.render_str(last.replace("\x1b", "")).plain
        for part in ("sft", "150/300  50%", "loss", "1.235", "lr", "2e-5", "grad", "12.3k", "3.14\u00a0GiB"):
            assert part in plain

    def test_evaluations_and_warnings_scroll_by(self, live):
        recorder, stream = live
        recorder.progress(1, 10)
        recorder.metrics(1, {"accuracy": 0.5}, split="eval")
        recorder.note("look [here]", level="warning")
        recorder.close()
        assert "accuracy" in stream.getvalue()
        assert "warning: look [here]" in stream.getvalue()

    def test_an_evaluation_shows_where_it_is(self, live):
        recorder, _stream = live
        recorder.progress(1, 10)
        recorder.progress(3, 8, phase="eval")
        sink = recorder._sinks[0]
        console = Console(file=StringIO(), width=120)
        console.print(sink._render())
        assert "eval 3/8" in console.file.getvalue()
        recorder.progress(2, 10)
        assert sink._part is None
        recorder.close()

    def test_an_evolution_moves_the_bar_and_training_starts_it_anew(self, live):
        recorder, _stream = live
        sink = recorder._sinks[0]

        def seen():
            console = Console(file=StringIO(), width=160)
            console.print(sink._render())
            return console.file.getvalue()

        recorder.progress(4, 40, phase="evolution")
        recorder.metrics(0, {"fitness": 0.25, "best_fitness": 0.5}, split="evolution")
        recorder.progress(10, 40, phase="evolution")
        for part in ("sft: evolution", "10/40  25%", "fitness\u00a00.2500", "best\u00a0fitness\u00a00.5000"):
            assert part in seen()
        assert sink.seconds_left() is not None
        recorder.progress(0, 300)
        assert sink.seconds_left() is None  # the pace of the evolution is not that of the training
        recorder.metrics(1, {"loss": 1.5})
        assert "evolution" not in seen()
        assert "loss" in seen()
        recorder.close()

    def test_without_a_known_end(self, live):
        recorder, stream = live
        recorder.progress(7, None)
        recorder.close()
        assert "7" in stream.getvalue()

    def test_level_warning_has_no_bar(self):
        stream = StringIO()
        sink = open_console("WARNING", console=Console(file=stream, force_terminal=True))
        recorder = Recorder([sink])
        recorder.progress(1, 2)
        recorder.metrics(1, LOGS)
        recorder.metrics(1, LOGS, split="eval")
        recorder.close()
        assert stream.getvalue() == ""


class TestText:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.333333, "0.3333"),
            (12.3456, "12.35"),
            (1234.56, "1,235"),
            (2e-5, "2e-5"),
            (1.25e-5, "1.25e-5"),
            (1.0, "1"),
            (123456789, "123,456,789"),
            (1.5e12, "1,500,000,000,000"),
            (1.23456e20, "1.23e20"),
            (-0.5, "-0.5000"),
            (0, "0"),
            (None, "–"),
            (float("nan"), "not finite"),
            (True, "true"),
        ],
    )
    def test_number(self, value, text):
        assert number(value) == text

    @pytest.mark.parametrize(("value", "text"), [(950, "950"), (12345, "12.3k"), (4.56e6, "4.56M"), (0.5, "0.5")])
    def test_short(self, value, text):
        assert short(value) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.82, "0.8s"), (42.4, "42s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (356400, "4d 03h")],
    )
    def test_duration(self, seconds, text):
        assert duration(seconds) == text

    def test_units(self):
        assert metric("tokens_per_second", 12345) == "12.3k/s"
        assert metric("memory_gib", 3.14159) == "3.14 GiB"
        assert value_text("pass@1", 0.512) == "51.2%"
        assert value_text("accuracy", 51.2) == "51.20"  # already in percent: left alone

    def test_labels(self):
        assert [label(name) for name in ("learning_rate", "rewards/format", "pass@1")] == [
            "Learning rate",
            "Rewards / format",
            "pass@1",
        ]

    def test_what_measures_the_machine(self):
        row = {"step": 1, "loss": 1.0, "tokens_per_second": 9.0, "elapsed_s": 3.0, "perf/rollout": 1.0, "num_tokens": 8}
        assert without_timing(row) == {"step": 1, "loss": 1.0, "num_tokens": 8}
        assert not is_timing("time_to_answer_reward")


def test_shown_values_are_bounded():
    assert len(shown_values({f"m{index}": 1.0 for index in range(50)}, "eval")) == 12
    assert shown_values({"loss": "text"}, "train") == []
