"""The doctor says what is wrong with this machine and what to install."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aligntune import doctor
from aligntune.backends import base, versions
from aligntune.backends.versions import TESTED, judge
from aligntune.cli.main import _register, app

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("file", "place"), [("constraints-low.txt", 0), ("constraints.txt", 1)])
def test_the_table_is_that_of_the_constraint_files(file: str, place: int) -> None:
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / file).read_text(), re.MULTILINE))
    assert {name: pair[place] for name, pair in TESTED.items() if name in pinned} == {
        name: version for name, version in pinned.items() if name in TESTED
    }


@pytest.mark.parametrize(
    ("package", "have", "says", "install"),
    [
        ("trl", "1.16.0", "1.16.0", None),
        ("trl", "1.15.0", "fail on the CPU", "1.16.0"),
        ("trl", "1.14.5", "between the tested 1.14.2 to 1.16.0", None),
        ("trl", "1.9.0", "older than what is tested", "1.16.0"),
        ("transformers", "6.0.0", "newer than what is tested", None),
        ("datasets", None, "missing; tested with 4.8.5 to 5.2.0", "5.2.0"),
    ],
)
def test_versions_are_judged(package: str, have: str | None, says: str, install: str | None) -> None:
    text, replacement = judge(package, have)
    assert says in text
    assert replacement == install


def test_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {name: newest for name, (_, newest) in TESTED.items()} | {"trl": "1.15.0", "datasets": None}
    monkeypatch.setattr(doctor, "installed", have.get)
    assert doctor.advice(list(doctor.versions())) == "pip install trl==1.16.0 datasets==5.2.0"
    assert versions.installed("a-package-that-is-not-there") is None


def test_being_offline_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(doctor, "HUB", "http://127.0.0.1:9")
    assert doctor.hub().state == "note"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub().text


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.disk(tmp_path / "new" / "run").state in ("ok", "note")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert doctor.disk(tmp_path).text.endswith("cannot be written (Permission denied)")


class Without:
    """An import path on which a package is not to be found."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(name, name=name)


@pytest.mark.parametrize("absent", [None, "trl"])
def test_the_verb_trains_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str | None) -> None:
    """Without TRL too: what was imported of it is forgotten, and it cannot be found."""
    _register()
    if absent is not None:
        for name in [
            name for name in sys.modules if name.split(".")[0] == absent or name.startswith("aligntune.backends.trl.")
        ]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [Without(absent), *sys.meta_path])
        monkeypatch.setattr(base, "find_spec", lambda name: None if name == absent else find_spec(name))
        monkeypatch.setattr(doctor, "installed", lambda name: None if name == absent else versions.installed(name))
    monkeypatch.setattr(doctor, "STEPS", 5)
    found = CliRunner().invoke(app, ["doctor", "--output", str(tmp_path)])
    assert found.exit_code == (0 if absent is None else 1), found.output
    assert ("trl is not installed" in found.output) == (absent is not None)
    assert re.search(r"ok    smoke run +5 steps in \d+ s, loss 5\.\d+ to [1-5]\.\d+", found.output)
    monkeypatch.setattr(doctor, "_train", lambda folder: [1.0, 2.0])
    assert CliRunner().invoke(app, ["doctor", "--output", str(tmp_path)]).exit_code == 1
