"""What README.md and docs/ tell people to type works: their commands, their Python, in the order in which they are written.

Hub names in them are folders here, which hold a tiny model.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import tiny
from aligntune import create_sft_trainer
from aligntune.cli import main as cli
from aligntune.cli.overrides import split
from aligntune.config.enums import TaskType
from aligntune.config.resolve import resolve
from aligntune.errors import ConfigError
from aligntune.rollouts.base import SamplingParams
from shell import aligntune

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"^(?:\$ |    |#\s+|# Run: )?(aligntune [a-z].*)$", re.MULTILINE)
INLINE = re.compile(r"`(aligntune [a-z][^`]*)`")
HUB = (
    "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", "answerdotai/ModernBERT-base", "microsoft/deberta-v3-base",
)  # fmt: skip


def commands() -> list[tuple[str, str]]:
    """(page, command) of every command in pages and in the heads of recipes, comments and optional parts taken off."""
    found = []
    for page in [*PAGES, *sorted(ROOT.glob("recipes/*.yaml"))]:
        text = page.read_text()
        for line in (*COMMAND.findall(text), *INLINE.findall(text)):
            plain = re.sub(r"\[[^\]=]*(\[[^\]]*\])?[^\]]*\](?=\s|$)", "", line.split("  #")[0])
            found.append((page.name, plain.replace("...", "x").strip()))
    return sorted(set(found))


def _text(page: str) -> str:
    return next(path for path in [*PAGES, *ROOT.glob("recipes/*.yaml")] if path.name == page).read_text()


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}(?: title=.*?)?\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def files(page: Path) -> dict[str, str]:
    """Name -> content of the blocks of a page that are files: by their title, or a first line `# NAME`."""
    found = re.findall(r'```\w+(?: title="(.*?)")?\n((?:# (\S+\.(?:yaml|py))\n)?.*?)```', page.read_text(), re.DOTALL)
    return {title or first: text for title, text, first in found if title or first}


def examples() -> list[tuple[Path, str]]:
    """(page, file) of every run that a page writes out."""
    return [
        (page, name) for page in PAGES for name, text in files(page).items()
        if name.endswith(".yaml") and text.removeprefix(f"# {name}\n").startswith("algorithm:")
    ]  # fmt: skip


def parts() -> list[tuple[str, str]]:
    """(page, YAML) of every part of a config that a page shows."""
    found = [(page.name, text) for page in PAGES for text in blocks(str(page.relative_to(ROOT)), "yaml")]
    return [(name, text) for name, text in found if not re.search(r"^algorithm:|^# \S+\.yaml", text, re.MULTILINE)]


def write_files(page: Path, folder: Path) -> None:
    for name, text in files(page).items():
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def place(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the files that the pages speak of; answers end after four tokens."""
    for name in HUB:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(hub)
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.chats(8))
    tiny.write_rows(tmp_path / "held_out.jsonl", tiny.chats(2, start=40))
    tiny.write_rows(tmp_path / "test.jsonl", tiny.chats(2, start=40))
    tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "say red", "answer": "red"}])
    tiny.write_rows(
        tmp_path / "problems.jsonl", [{"prompt": f"{at} + 1 = ?", "answer": str(at + 1)} for at in range(2)]
    )
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    write_files(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    checked = SamplingParams.__post_init__

    def short(params: SamplingParams) -> None:
        object.__setattr__(params, "max_new_tokens", min(4, params.max_new_tokens))
        checked(params)

    monkeypatch.setattr(SamplingParams, "__post_init__", short)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda text: text.replace("/", "_"))
def test_a_command_is_one(place: Path, page: str, line: str) -> None:
    """The command's parser takes it, and the config of its file and overrides is valid."""
    write_files(next(path for path in [*PAGES, *ROOT.glob("recipes/*.yaml")] if path.name == page), place)
    cli._register()
    command = typer.main.get_command(cli.app)
    words = shlex.split(line)
    context, inline = command.make_context(words[0], words[1:]), f"`{line}`" in _text(page)
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        assert name is not None
        assert command is not None
        if inline and not rest:
            return  # a verb that is spoken of
        context = command.make_context(name, rest, parent=context)
    if name in ("train", "validate", "explain", "preview") and context.parent.info_name != "reward":
        source, overrides = split(context.params["file"], context.args)
        resolve(source, overrides=overrides)


def test_the_readme_from_top_to_bottom(place: Path) -> None:
    """Its five minutes: every command in turn, then its Python on what they left."""
    shell = next(block for block in blocks("README.md", "sh") if "validate" in block)
    lines = [line.split("  #")[0].strip() for line in shell.splitlines()]
    assert len(lines) >= 7
    small = {"train": ["evaluation.max_new_tokens=2"], "eval": ["evaluation.max_new_tokens=2"]}
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "chat":
            continue  # waits for a person; `Chat` has its own tests
        done = aligntune(*words, *small.get(words[0], []))
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout, line
    assert (place / "merged" / "model.safetensors").exists()
    assert (place / "runs" / "first" / "report.html").exists()
    (code,) = blocks("README.md", "python")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", ["docs/api.md", "docs/dpo.md", "docs/evaluation.md", "docs/online-rl.md"])
def test_the_python_of_a_page(place: Path, page: str) -> None:
    """Runs as it is written, in a folder where its names exist."""
    (code,) = blocks(page, "python")
    if page == "docs/evaluation.md":
        tiny.write_model(place / "output" / "model")
    if page == "docs/dpo.md":
        pairs = [{"prompt": "say red", "chosen": "red", "rejected": "blue"}]
        tiny.write_rows(place / "pairs.jsonl", pairs * 4)
        tiny.write_rows(place / "held_out.jsonl", pairs)
    if page == "docs/online-rl.md":
        tiny.write_rows(place / "held_out.jsonl", [{"prompt": "1 + 1 = ?", "answer": "2"}])
    exec(compile(code, page, "exec"), {})


EVOLUTION = ["train.meta_iterations=1", "train.N=2", "train.T=1"]


@pytest.mark.parametrize(("page", "name"), examples(), ids=lambda value: getattr(value, "name", value))
def test_an_example_trains(place: Path, page: Path, name: str) -> None:
    """A run that a page writes out, on the rows that it shows, made small."""
    write_files(page, place)
    run = yaml.safe_load((place / name).read_text())
    rows = run["dataset"]["name"]
    assert rows in files(page), "the page shows its rows"
    (place / "held_out.jsonl").write_text(files(page)[rows])
    done = aligntune("train", name, "train.max_steps=1", *(EVOLUTION if run["algorithm"] == "meta_es" else ()))
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


@pytest.mark.parametrize("task", [*TaskType])
def test_the_rows_of_a_task(place: Path, task: TaskType) -> None:
    """The rows shown for each task type are read as it, and trained on."""
    write_files(ROOT / "docs/sft.md", place)
    trainer = create_sft_trainer(
        "Qwen/Qwen2.5-0.5B", f"{task.value}.jsonl", task_type=task, max_steps=1, output_dir=str(place / "run")
    )
    trainer.train()
    assert (place / "run" / "model").is_dir()


@pytest.mark.parametrize(("page", "text"), parts())
def test_a_part_of_a_config(place: Path, page: str, text: str) -> None:
    """Fits a run of supervised fine-tuning or of GRPO."""
    part, refused = yaml.safe_load(text), []
    for rest in (
        {"algorithm": "sft", "model": {"name_or_path": "m"}, "dataset": {"name": "rows.jsonl"}},
        {
            "algorithm": "grpo",
            "model": {"name_or_path": "m"},
            "dataset": {"name": "d"},
            "rewards": [{"type": "length"}],
        },
    ):
        whole = {
            key: {**rest.get(key, {}), **part.get(key, {})}
            if isinstance(part.get(key), dict)
            else part.get(key, rest.get(key))
            for key in {**rest, **part}
        }
        if "datasets" in part:
            del whole["dataset"]
        try:
            resolve(whole)
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) < 2, "\n".join(refused)


def test_the_reward_models(place: Path) -> None:
    """Every command of the page in turn."""
    page = ROOT / "docs/reward-models.md"
    write_files(page, place)
    (place / "held_out_pairs.jsonl").write_text(files(page)["pairs.jsonl"])
    tiny.write_rows(place / "answers.jsonl", [{"prompt": "Say hello.", "completion": "Hello!"}])
    for line in "".join(blocks("docs/reward-models.md", "sh")).splitlines():
        done = aligntune(*shlex.split(line.split("  #")[0])[1:])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert json.loads((place / "scores.jsonl").read_text())["score"]
    assert (place / "distilled" / "model" / "config.json").exists()


def test_the_loss_of_ones_own(place: Path) -> None:
    _, code = blocks("docs/own-loss.md", "python")
    write_files(ROOT / "docs/own-loss.md", place)
    exec(compile(code, "docs/own-loss.md", "exec"), {})
    rows = [json.loads(line) for line in (place / "output" / "cispo" / "metrics.jsonl").read_text().splitlines()]
    assert "clipped_share" in rows[0]
    assert "approx_kl" in rows[0]
    trainer = create_sft_trainer(
        "Qwen/Qwen2.5-0.5B", "rows.jsonl", loss_function="mine.py:focal", max_steps=1, output_dir=str(place / "sft")
    )
    assert trainer.train()["train_loss"] > 0


def test_the_quickstart_takes_as_long_everywhere() -> None:
    length = "about half a minute of training"
    told = [(ROOT / page).read_text() for page in ("README.md", "docs/index.md")]
    assert all(length in " ".join(text.split()) for text in [*told, aligntune("quickstart", "--help").stdout])


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in ROOT.glob("docs/*.md"))
    assert len(set(listed)) == len(listed)


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files and headings; from a page of the site to pages of the site only, or it is not built."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert page.parent != ROOT / "docs" or target.parent == page.parent, link
        if anchor:
            assert anchor in {_slug(found) for found in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}, (
                link
            )
