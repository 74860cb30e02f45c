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

import tiny
from aligntune.cli import main as cli
from aligntune.cli.overrides import split
from aligntune.config.resolve import resolve
from aligntune.rollouts.base import SamplingParams
from shell import aligntune

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMAND = re.compile(r"^(?:\$ |    |#\s+|# Run: )?(aligntune [a-z].*)$", re.MULTILINE)
INLINE = re.compile(r"`(aligntune [a-z][^`]*)`")
HUB = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct")


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
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def place(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the files that the pages speak of; answers end after four tokens."""
    (tmp_path / "Qwen").mkdir()
    for name in HUB:
        (tmp_path / name).symlink_to(hub)
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.chats(8))
    tiny.write_rows(tmp_path / "held_out.jsonl", tiny.chats(2, start=40))
    tiny.write_rows(tmp_path / "test.jsonl", tiny.chats(2, start=40))
    tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "say red", "answer": "red"}])
    tiny.write_rows(
        tmp_path / "problems.jsonl", [{"prompt": f"{at} + 1 = ?", "answer": str(at + 1)} for at in range(2)]
    )
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "run.yaml").write_text(blocks("README.md", "yaml")[0])
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


@pytest.mark.parametrize("page", ["docs/dpo.md", "docs/evaluation.md", "docs/online-rl.md"])
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


def test_the_loss_of_ones_own(place: Path) -> None:
    functions, code = blocks("docs/own-loss.md", "python")
    (place / "mine.py").write_text(functions)
    exec(compile(code, "docs/own-loss.md", "exec"), {})
    rows = [json.loads(line) for line in (place / "output" / "cispo" / "metrics.jsonl").read_text().splitlines()]
    assert "clipped_share" in rows[0]
    assert "approx_kl" in rows[0]


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
        assert page.parent.name != "docs" or target.parent == page.parent, link
        if anchor:
            assert anchor in {_slug(found) for found in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}, (
                link
            )
