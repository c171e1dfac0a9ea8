"""Commands that the documentation shows: all of them parse, and those of the guides run, on a tiny model in place of a real one."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from conftest import REPOSITORY, Run
from tinydata import tiny_decoder, write_data, write_model

from causalprune.cli import app as cli

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
FITTED = {"20x": "2x"}
"""A tiny model has too few heads for a budget of a twentieth."""


def commands(page: Path) -> list[list[str]]:
    """Return the words of every `causalprune` command in the shell blocks of a page."""
    lines = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [own[1:] for own in words if own[:1] == ["causalprune"]]


SHOWN = [(page, own) for page in PAGES for own in commands(page)]


def test_commands_are_found() -> None:
    assert len(SHOWN) > 30
    assert {page.name for page, _ in SHOWN} >= {
        "README.md",
        "index.md",
        "own-task.md",
        "report.md",
        "large.md",
    }


@pytest.mark.parametrize(
    ("page", "words"), SHOWN, ids=[f"{page.stem}: {' '.join(words)}" for page, words in SHOWN]
)
def test_every_command_parses(page: Path, words: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    with group.make_context("causalprune", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        with command.make_context(name, rest, parent=context):
            pass


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with what the pages take for granted: examples, recipes, data, a model, one that was tuned."""
    model = tmp_path / "MODEL"
    decoder = tiny_decoder(positions=4096)
    write_model(model, decoder)
    for name in ("FOLDER", "tuned"):
        shutil.copytree(model, tmp_path / name)
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    data = write_data(tmp_path / "data", rows=200)
    for name in ("train", "test"):
        shutil.copy(tmp_path / "examples" / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("causalprune.checkpoints.embedded.embedded_model", lambda: model)
    return data


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README", "index", "own-task", "report"])
def test_the_commands_of_the_guides_run_in_order(
    run: Run, place: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = REPOSITORY / "README.md" if page == "README" else REPOSITORY / "docs" / f"{page}.md"
    if page == "report":  # goes on where the guide to a task of one's own ends
        assert run("run", "examples/own.yaml", "-o", "own")[0] == 0
        shutil.copytree("own", "other")
    for shown in commands(path):
        words = [FITTED.get(word, word) for word in shown]
        if words[0] == "demo":
            continue  # `make demo`; too long for a test
        monkeypatch.setenv("CAUSALPRUNE_DATA", str(place))
        takes_data = words[0] in ("attribute", "stability", "prune", "shrink", "evaluate", "run")
        code, _, err = run(*words, *(("--data-dir", place) if takes_data else ()))
        lost = (
            words[0] == "verify" and "--against" in words
        )  # what was tuned here has no zeros, and it says so
        assert code == int(lost), f"causalprune {shlex.join(words)}: {err}"
