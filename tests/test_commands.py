"""Commands that the documentation shows: all of them parse, and all that carry no mark run, on a tiny model in place of a real one."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import shipped
import typer
from conftest import REPOSITORY, Run
from tinydata import tiny_decoder, write_data, write_model

from causalprune.cli import app as cli
from causalprune.evaluation import written
from causalprune.runs import general

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
MARK = re.compile(r"# needs: (\w[\w.]*)")
MARKS = ("network", "gpu", "hours", "llama.cpp", "ray")
"""What a command may need that a test has not: such a command carries the word, and is not run."""
FITTED = {"20x": "2x"}
"""A tiny model has too few heads for a budget of a twentieth."""
TAKE_DATA = ("attribute", "circuit", "stability", "prune", "shrink", "sweep", "evaluate", "run")
SHARE = 0.9
"""Share of the commands that carry no mark, at least."""

Shown = tuple[list[str], str | None]
"""The words of a command after `causalprune`, and its mark."""


def commands(page: Path) -> list[Shown]:
    """Return every `causalprune` command in the shell blocks of a page, with its mark."""
    lines = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines()
    words = [(shlex.split(line, comments=True), MARK.search(line)) for line in lines]
    return [(own[1:], mark and mark[1]) for own, mark in words if own[:1] == ["causalprune"]]


SHOWN = [(page, *one) for page in PAGES for one in commands(page)]


def test_commands_are_found_and_few_of_them_marked() -> None:
    marks = [mark for _, _, mark in SHOWN]
    assert len(SHOWN) > 30
    assert {mark for mark in marks if mark} <= set(MARKS)
    assert marks.count(None) >= SHARE * len(SHOWN)


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words) for page, words, _ in SHOWN],
    ids=[f"{page.stem}: {' '.join(words)}" for page, words, _ in SHOWN],
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
    for name in ("FOLDER", "tuned", "merged"):
        shutil.copytree(model, tmp_path / name)
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    data = write_data(tmp_path / "data", rows=200)
    for name in ("train", "test"):
        shutil.copy(tmp_path / "examples" / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("causalprune.checkpoints.embedded.embedded_model", lambda: model)
    monkeypatch.setenv("CAUSALPRUNE_DATA", str(data))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(written, "PIECE", 24)  # of the text that the model writes
    monkeypatch.setattr(general, "TOKENS", 96)
    return data


BEFORE = {
    "large": (("prune", "MODEL", "-o", "pruned", "--method", "magnitude"),),
    "report": (("run", "examples/own.yaml", "-o", "own"), ("run", "examples/own.yaml", "-o", "other")),
}
"""What a page goes on from, as another page has it."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*all that it holds")
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_order(
    run: Run, place: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.stem in ("shipping", "own-task"):  # llama.cpp knows some tokenizers
        model = shipped.write(tmp_path / "shipped", max_position_embeddings=1024)
        monkeypatch.setattr("causalprune.checkpoints.embedded.embedded_model", lambda: model)
    for words in BEFORE.get(page.stem, ()):
        assert run(*words, "--data-dir", place)[0] == 0
    for shown, mark in commands(page):
        if mark is not None:
            continue
        words = [FITTED.get(word, word) for word in shown]
        words += (
            ["--pre-tokenizer", "gpt-2"] if words[0] == "export" else []
        )  # of a tokenizer that nobody knows
        words = [str(own) for word in words for own in (sorted(Path().glob(word)) if "*" in word else [word])]
        if "--shard" in words:  # the others, on other machines
            for part in ("2/4", "3/4", "4/4"):
                assert run(*(part if word == "1/4" else word for word in words), "--data-dir", place)[0] == 0
        code, _, err = run(*words, *(("--data-dir", place) if words[0] in TAKE_DATA else ()))
        # what was tuned or merged here has no zeros, and `verify` says so
        lost = words[0] == "verify" and "--against" in words and not words[1].endswith(".gguf")
        assert code == int(lost), f"causalprune {shlex.join(words)}: {err}"
