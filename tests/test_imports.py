"""The doors answer at once: nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "pandas")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    report = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", [
    "import aligntune",
    "import aligntune.core.backend_factory",
    "import aligntune.api",
    "import aligntune.reporting",
    "from aligntune.config.resolve import resolve; resolve({'model': 'm', 'dataset': 'd'}, algorithm='sft').rows()",
])  # fmt: skip
def test_light_imports(code: str) -> None:
    assert modules_after(code).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "verb",
    [["--help"], ["train", "--help"], ["validate", "RUN"], ["explain", "RUN"], ["config", "schema"]],
    ids=" ".join,
)
def test_light_verbs(verb: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("algorithm: grpo\nmodel: m\ndataset: d\nrewards: [length]\n")
    arguments = ["aligntune", *(str(run) if word == "RUN" else word for word in verb)]
    code = (
        f"import sys, io, contextlib; sys.argv = {arguments!r}\n"
        "from aligntune.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()"
    )
    assert modules_after(code).isdisjoint(HEAVY)
