"""The page is built from the files alone, says what happened, and lets nothing of the data act as markup."""

import json
import math
from html.parser import HTMLParser

import pytest
import yaml

from aligntune.reporting import Recorder, RunDirectory, provenance, sections, write_report
from aligntune.reporting.events import TrailSink
from aligntune.reporting.figures import metric_groups, section_groups
from aligntune.reporting.reading import RunRecord
from aligntune.reporting.story import cards, comparisons, evaluations, facts, subject, title

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


class Outline(HTMLParser):
    """Tags with attributes, headings, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.stack = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def names(self):
        return {tag for tag, _ in self.tags}


@pytest.fixture
def run(tmp_path):
    """An SFT run of four steps with two evaluations and samples before and after."""
    run = RunDirectory.create(tmp_path / "out")
    with run.session():
        config = {
            "algorithm": "sft",
            "model": {"name_or_path": "org/tiny-lm"},
            "dataset": {"name": "data/sums.jsonl"},
            "train": {"learning_rate": 0.1, "hub_token": "hf_secretsecret", "stop_token": "eos"},
        }
        run.write_text("config.yaml", yaml.safe_dump(config))
        run.write_json(
            "config.origins.json",
            [
                {"path": "train.learning_rate", "value": 0.1, "origin": "run.yaml:4"},
                {"path": "train.hub_token", "value": "hf_secretsecret", "origin": "override"},
                {"path": "train.stop_token", "value": "eos", "origin": "default"},
            ],
        )
        run.write_json(
            "provenance.json", provenance.collect(seeds={"seed": 7}, command=["aligntune", "train", "run.yaml"])
        )
        recorder = Recorder([TrailSink(run)])
        recorder.sample(0, {"prompt": "2 + 2 =", "completion": " 7", "reference": "4"})
        for step in range(1, 5):
            recorder.metrics(
                step, {"loss": 4 / step, "learning_rate": 0.1, "num_tokens": 100 * step, "epoch": step / 4}
            )
        recorder.metrics(2, {"loss": 3.0, "accuracy": 0.25, "runtime": 1.0}, split="eval")
        recorder.metrics(4, {"loss": 2.0, "accuracy": 0.75, "runtime": 1.0}, split="eval")
        recorder.sample(4, {"prompt": "2 + 2 =", "completion": " 4", "reference": "4", "rewards": {"exact": 1.0}})
        recorder.close()
    return run


def page(run):
    return write_report(run).read_text(encoding="utf-8")


class TestStory:
    def test_subject(self, run):
        record = RunRecord.load(run)
        assert subject(record) == title(record) == "SFT of tiny-lm on sums"

    def test_cards_put_held_out_quality_first(self, run):
        found = [(c.title, c.split, c.before, c.after, c.verdict) for c in cards(RunRecord.load(run))]
        assert found == [
            ("Accuracy", "held-out", "25.0%", "75.0%", "better"),
            ("Loss", "held-out", "3", "2", "better"),
            ("Loss", "train", "4", "1", "better"),
        ]

    def test_a_metric_that_got_worse_says_so_and_where_it_was_best(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step, value in ((1, 0.5), (2, 0.9), (3, 0.4)):
            recorder.metrics(step, {"f1": value}, split="eval")
        (card,) = cards(RunRecord.load(run))
        assert (card.verdict, card.best) == ("worse", "best 0.900 at step 2")

    def test_a_best_that_the_end_equals_is_not_named(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step in (1, 2):
            recorder.metrics(step, {"f1": 0.5}, split="eval")
        (card,) = cards(RunRecord.load(run))
        assert card.best == ""

    def test_rejected_answers_are_no_headline_and_have_no_best(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step, value in ((1, 0.0), (2, -0.1)):
            recorder.metrics(step, {"rewards/rejected": value, "rewards/margins": -value}, split="eval")
        record = RunRecord.load(run)
        assert [card.title for card in cards(record)] == ["Rewards / margins"]
        (table,) = evaluations(record)
        best = [[bold for _, bold in row] for _, row in table["rows"]]
        assert [row[table["columns"].index("Rewards / rejected")] for row in best] == [False, False]

    def test_the_rouges_leave_room_for_the_loss(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step in (1, 2):
            recorder.metrics(
                step, dict.fromkeys(("rouge1", "rouge2", "rougeL", "bleu", "loss", "perplexity"), step), split="eval"
            )
        assert {card.title for card in cards(RunRecord.load(run))} == {"RougeL", "BLEU", "Loss", "Perplexity"}

    def test_the_loss_of_a_policy_is_no_headline(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step in (1, 2):
            recorder.metrics(step, {"loss": 0.01, "reward": step / 2})
        assert [card.title for card in cards(RunRecord.load(run))] == ["Reward"]

    def test_facts(self, run):
        assert facts(RunRecord.load(run))[:3] == [("steps", "4"), ("epochs", "1"), ("tokens", "400")]

    def test_samples_are_paired_by_prompt(self, run):
        (item,) = comparisons(RunRecord.load(run))
        assert (item.prompt, item.reference) == ([("", "2 + 2 =")], "4")
        assert (item.before["text"], item.before["step"]) == (" 7", 0)
        assert (item.after["text"], item.after["scores"]) == (" 4", [("exact", "1")])

    def test_several_samples_of_one_prompt_and_messages(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        prompt = [{"role": "user", "content": "hi"}]
        for step, text in ((0, "a"), (0, "b"), (9, "c"), (9, "d")):
            recorder.sample(step, {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]})
        found = comparisons(RunRecord.load(run))
        assert [(c.before["text"], c.after["text"]) for c in found] == [("a", "c"), ("b", "d")]
        assert found[0].prompt == [("user", "hi")]

    def test_evaluations_mark_the_best(self, run):
        (table,) = evaluations(RunRecord.load(run))
        assert table["columns"] == ["Loss", "Accuracy"]
        assert table["rows"] == [(2, [("3", False), ("25.0%", False)]), (4, [("2", True), ("75.0%", True)])]

    def test_many_evaluations_are_thinned_but_keep_first_last_and_best(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step in range(1, 101):
            recorder.metrics(step, {"accuracy": 1.0 if step == 38 else 0.5}, split="eval")
        (table,) = evaluations(RunRecord.load(run))
        steps = [step for step, _ in table["rows"]]
        assert len(steps) <= 13
        assert {1, 38, 100} <= set(steps)
        assert table["all"] == 100


class TestFigures:
    def group(self, tmp_path, rows):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step, split, values in rows:
            recorder.metrics(step, values, split=split)
        return {group.title: group for group in metric_groups(RunRecord.load(run))}

    def test_splits_share_a_chart(self, run):
        groups = {group.title: group for group in metric_groups(RunRecord.load(run))}
        loss = groups["Learning"].figures[0]
        assert (loss.title, loss.wide) == ("Loss", True)
        assert ">train</text>" in loss.svg
        assert ">eval</text>" in loss.svg

    def test_what_never_changes_needs_no_chart(self, run):
        groups = {group.title: group for group in metric_groups(RunRecord.load(run))}
        assert ("Learning rate", "0.1000") in groups["Learning"].constants
        assert [figure.title for figure in groups["Learning"].figures] == ["Loss", "Accuracy"]

    def test_rewards_by_name_and_stage(self, tmp_path):
        values = ("rewards/exact/raw", "rewards/format/raw", "rewards/exact/weighted", "rewards/format/weighted")
        rows = [(step, "train", {name: step * (index + 1) for index, name in enumerate(values)}) for step in (1, 2)]
        figures = self.group(tmp_path, rows)["Rewards"].figures
        assert [figure.title for figure in figures] == ["Rewards, raw", "Rewards, weighted"]
        assert ">exact</text>" in figures[0].svg
        assert ">format</text>" in figures[0].svg

    def test_pair_rewards_keep_accuracies_apart(self, tmp_path):
        names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies")
        rows = [(step, "train", {name: step + index for index, name in enumerate(names)}) for step in (1, 2)]
        assert [f.title for f in self.group(tmp_path, rows)["Rewards"].figures] == ["Accuracies", "Rewards"]

    def test_more_curves_than_colours_are_split(self, tmp_path):
        rows = [(step, "train", {f"rewards/r{index}/mean": step * index for index in range(9)}) for step in (1, 2)]
        assert len(self.group(tmp_path, rows)["Rewards"].figures) == 2

    def test_a_single_point_is_no_curve(self, tmp_path):
        assert self.group(tmp_path, [(1, "train", {"loss": 1.0})]) == {}

    def test_a_later_section_takes_the_place_of_an_earlier_one(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        recorder = Recorder([TrailSink(run)])
        for step in (1, 2):
            recorder.section("matrix", "Confusion", sections.matrix([[step]], ["a"], ["a"]), step=step)
        (section,) = section_groups(RunRecord.load(run))["Results"]
        assert section["step"] == 2
        assert section["svg"].startswith("<svg")


def write_evil(run):
    recorder = Recorder([TrailSink(run)])
    for step in (1, 2, 3):
        recorder.metrics(step, {EVIL: step, f"rewards/{EVIL}/mean": step, "loss": step})
        recorder.metrics(step, {EVIL: step, "accuracy": step}, split=EVIL)
    recorder.sample(1, {"prompt": EVIL, "completion": EVIL, "reference": EVIL, EVIL: EVIL, "rewards": {EVIL: 1.0}})
    recorder.sample(2, {"prompt": [{"role": EVIL, "content": EVIL}], "completion": EVIL})
    recorder.note(EVIL, level="warning")
    recorder.note(EVIL + "2")
    payloads = {
        "table": sections.table([EVIL], [[EVIL]], note=EVIL),
        "series": sections.series([sections.curve(EVIL, [1, 2], [1, 2]), sections.curve("b", [1], [1])], x_label=EVIL),
        "bars": sections.bars([EVIL], {EVIL: [1.0], "b": [2.0]}),
        "matrix": sections.matrix([[1]], [EVIL], [EVIL], EVIL, EVIL),
        "text": sections.text(EVIL),
        "samples": sections.samples([{EVIL: EVIL}]),
    }
    for kind, payload in payloads.items():
        recorder.section(kind, EVIL + kind, payload, group=EVIL)
    raise RuntimeError(EVIL)


class TestPage:
    def test_it_is_one_file_without_network_or_script(self, run):
        outline = Outline(page(run))
        assert outline.stack == []
        assert not outline.names() & {"script", "link", "iframe", "img", "object", "embed"}
        assert not any(name in attrs for _, attrs in outline.tags for name in ("src", "href", "onclick", "onload"))
        text = page(run)
        assert "@import" not in text
        assert "url(" not in text

    def test_it_says_what_happened(self, run):
        text = " ".join("".join(Outline(page(run)).text).split())
        for part in (
            "finished",
            "SFT of tiny-lm on sums",
            "25.0% → 75.0%",
            "Before step 0 7",
            "After step 4 4",
            "run.yaml:4",
        ):
            assert part in text
        assert "1 settings at their default" in text
        assert f"aligntune train {run.config}" in text

    def test_secrets_are_masked(self, run):
        text = page(run)
        assert "hf_secretsecret" not in text
        assert "***" in text
        assert "eos" in text  # a stop token is no secret

    def test_nothing_of_the_data_acts_as_markup(self, tmp_path):
        run = RunDirectory.create(tmp_path / "out")
        run.write_text("config.yaml", yaml.safe_dump({"algorithm": EVIL, "model": {"name_or_path": EVIL}, EVIL: EVIL}))
        run.write_json("config.origins.json", [{"path": EVIL, "value": EVIL, "origin": EVIL}])
        run.write_json("provenance.json", {EVIL: EVIL, "packages": {EVIL: EVIL}, "data": [{EVIL: EVIL}]})
        with pytest.raises(RuntimeError), run.session():
            write_evil(run)
        text = page(run)
        outline = Outline(text)
        assert not outline.names() & {"script", "img"}
        assert not any("onerror" in attrs for _, attrs in outline.tags)
        assert EVIL in "".join(outline.text)

    def test_a_failed_run_shows_its_error_and_how_to_go_on(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        run.write_text("config.yaml", "algorithm: sft\n")
        (run.checkpoints / "checkpoint-3").mkdir(parents=True)
        run.mark_checkpoint(run.checkpoints / "checkpoint-3", 3)
        with pytest.raises(RuntimeError), run.session():
            raise RuntimeError("out of memory")
        text = "".join(Outline(page(run)).text)
        assert "failed" in text
        assert "RuntimeError" in text
        assert "out of memory" in text
        assert "--resume" in text

    def test_a_killed_run_is_not_shown_as_a_result(self, run):
        status = run.read_status()
        run.write_json("status.json", {**status, "status": "running"})
        text = page(run)
        assert "killed before it finished" in text
        assert "did not finish" in text
        assert 'class="after better"' not in text

    def test_an_empty_directory_has_a_page(self, tmp_path):
        assert "of unknown outcome" in page(RunDirectory.create(tmp_path / "empty"))

    def test_origins_as_triples_and_no_origins(self, run):
        run.write_json("config.origins.json", [["train.lr", 0.1, "derived: rule"]])
        assert "derived: rule" in page(run)
        run.origins.unlink()
        assert "train.learning_rate" in page(run)

    def test_damaged_files_are_named(self, run):
        run.write_text("config.yaml", "a: [")
        with pytest.raises(ValueError, match=r"config\.yaml is not YAML"):
            write_report(run.path)
        run.write_text("config.yaml", "a: 1")
        run.write_text("provenance.json", "{")
        with pytest.raises(ValueError, match=r"provenance\.json is not JSON"):
            write_report(run.path)

    def test_a_long_run_stays_small(self, tmp_path):
        run = RunDirectory.create(tmp_path)
        rows = (
            {"step": s, "split": "train", "loss": 2 + math.sin(s), "grad_norm": math.cos(s)} for s in range(1, 20_001)
        )
        run.metrics.replace(rows)
        assert len(page(run)) < 150_000


class TestProvenance:
    def test_what_is_known(self):
        facts_ = provenance.collect(
            seeds={"seed": 1},
            data=[{"name": "a"}],
            backend="native",
            backend_reasons=["trl: no"],
            command=["x"],
            note="n",
        )
        assert facts_["backend"] == {"name": "native", "reasons": ["trl: no"]}
        assert facts_["packages"]["pydantic"]
        assert facts_["note"] == "n"
        json.dumps(facts_)

    @pytest.mark.parametrize(
        ("given", "masked"),
        [
            (["--hub_token", "abc", "x"], ["--hub_token", "***", "x"]),
            (["train.hub_token=abc"], ["train.hub_token=***"]),
            (["--api-key=abc"], ["--api-key=***"]),
            (["hf_0123456789"], ["***"]),
            (["--stop_token", "eos"], ["--stop_token", "eos"]),
            (["--learning_rate", "2e-5"], ["--learning_rate", "2e-5"]),
        ],
    )
    def test_secrets(self, given, masked):
        assert provenance.mask_secrets(given) == masked

    def test_git(self, tmp_path):
        assert provenance.git_state(tmp_path) is None

    def test_git_of_a_repository(self, tmp_path):
        import shutil
        import subprocess

        if shutil.which("git") is None:
            pytest.skip("git is not installed")
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        (tmp_path / "f").write_text("1")
        for command in (["init", "-q", "-b", "main"], ["add", "f"], [*identity, "commit", "-q", "-m", "m"]):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
        state = provenance.git_state(tmp_path)
        assert (len(state["commit"]), state["branch"], state["changed"]) == (40, "main", False)
        (tmp_path / "f").write_text("2")
        assert provenance.git_state(tmp_path)["changed"] is True
