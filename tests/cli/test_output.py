"""What every command has: a version, help by two names, JSON in place of tables, silence, a log, and words before or after."""

import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shipped
import typer
import yaml
from conftest import PACKAGE, REPOSITORY, Run, assert_refused
from tinydata import write_jsonl

import causalprune
from causalprune.cli.app import app, in_front, main, one_line
from causalprune.cli.output import Voice, document, voice
from causalprune.core import say

PROSE = ("report",)
"""Commands that print no table."""
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def own_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these words, apart from this process."""
    variables = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run(
        [sys.executable, *words], env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.thorough
def test_the_version_alone_by_the_module_and_soon() -> None:
    done = own_process("-X", "importtime", "-m", "causalprune", "--version")
    assert (done.returncode, done.stdout) == (0, f"{causalprune.__version__}\n")
    assert "causalprune.cli.output" in done.stderr
    assert "torch" not in done.stderr


@pytest.mark.thorough
def test_completion_knows_commands_and_options() -> None:
    code = "import sys; sys.argv[0] = 'causalprune'; from causalprune.cli.app import main; main()"
    for typed, expected in (
        ("causalprune swe", "sweep"),
        ("causalprune prune --preserve-", "--preserve-share"),
    ):
        asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        done = own_process("-c", code, **asked, _CAUSALPRUNE_COMPLETE="complete_bash")
        assert expected in done.stdout.split(), done.stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_by_its_short_name(run: Run, command: str) -> None:
    words = [command] if command else []
    assert run(*words, "-h") == run(*words, "--help")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("prune m --quiet -o x", "--quiet prune m -o x"),
        ("prune m --log-file f -o x --debug", "--log-file f --debug prune m -o x"),
        ("prune --log-file=f m", "--log-file=f prune m"),
        ("--quiet --log-file f prune m", "--quiet --log-file f prune m"),
        ("prune --log-file", "--log-file prune"),
    ],
)
def test_options_of_every_command_may_stand_anywhere(words: str, expected: str) -> None:
    assert in_front(words.split()) == expected.split()


@pytest.fixture(scope="module")
def calls(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Return a call of every command that prints a table, in an order in which they can follow each other."""
    place = tmp_path_factory.mktemp("calls")
    recipe = {
        "model": {"name": str(model)},
        "calibration": {"task": ["gsm8k"], "n": 6},
        "methods": ["magnitude"],
        "sparsities": [0.5],
        "on": ["gsm8k_nll:3"],
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given, some = ["--data-dir", data], ["-t", "gsm8k", "-n", 3]
    own, bad = place / "circuit", place / "bad.jsonl"
    write_jsonl(bad, [{"prompt": f"{i} apples", "target": " and pears"} for i in range(8)])
    file = ["--gguf", "f16", "--pre-tokenizer", "gpt-2"]
    only = ["--size", "1GB", "--types", "f16,bf16", "--shares", "0.1", *file[2:]]
    spared = ["--preserve", "gsm8k:8", "--budget", 4, "--harm", "1000%"]
    return {
        "run": [place / "recipe.yaml", "-o", place / "run", *given],
        "inspect": [model],
        "data": [model, "-t", "gsm8k", *given],
        "attribute": [model, "-o", place / "effects", *some, *given],
        "merge": [place / "effects" / "effects.json", "-o", place / "merged.json", "--overwrite"],
        "effects": [place / "effects"],
        "stability": [model, "-o", place / "stability", "-t", "gsm8k", "-n", 1, "--top", 3, *given],
        "circuit": [model, "-o", own, "-t", "ioi:16", "--controls", 0, "--rescore", 1, "--keep", 0.5],
        "overlap": [own, own / "circuit.json", "-o", place / "both", "--remove", 1],
        "prune": [model, "-o", place / "pruned", "--method", "magnitude", "--overwrite", *given],
        "sweep": [
            model,
            "-o",
            place / "sweep",
            "--method",
            "magnitude",
            *some,
            "--on",
            "gsm8k_nll:2",
            *given,
        ],
        "correct": [model, "-o", place / "fixed", "--undesired", bad, *spared, "--overwrite", *given],
        "shrink": [model, "-o", place / "small", "--layers", 0.5, *some, "--overwrite", *given],
        "verify": [place / "pruned"],
        "export": [place / "pruned", "-o", place / "model.gguf", *file, "--no-check", "--overwrite"],
        "fit": [
            shipped.write(place / "known", max_position_embeddings=512),
            "-o",
            place / "fitted",
            *some,
            *only,
            "--on",
            "gsm8k_nll:4",
            *given,
        ],
        "reapply": [place / "pruned", model, "-o", place / "again", "--overwrite"],
        "evaluate": [model, "--on", "gsm8k_nll:2", "-o", place / "found.json", "--overwrite", *given],
        "compare": [place / "run"],
    }


EXPECTED: dict[str, Callable[[Any], bool]] = {
    "run": lambda own: [row["label"] for row in own["rows"]] == ["dense", "magnitude-matrix-0.5"],
    "inspect": lambda own: own["heads"] == 4,
    "data": lambda own: own["sources"][0]["rows"] == 12,
    "attribute": lambda own: len(own["units"]) == 8,
    "merge": lambda own: {unit["kind"] for unit in own["units"]} == {"head"},
    "effects": lambda own: own["exact"] is True,
    "stability": lambda own: own["interactions"]["pairs"] == 3,
    "circuit": lambda own: len(own["members"]) == own["size"],
    "overlap": lambda own: own["over_chance"][0][1] == 1.0,
    "prune": lambda own: 0 < own["zeros"] < own["weights"],
    "sweep": lambda own: {"sparsity", "holds"} <= own["tried"][0].keys(),
    "correct": lambda own: 0 < len(own["members"]) <= 4,
    "shrink": lambda own: own["after"]["parameters"] < own["before"]["parameters"],
    "verify": lambda own: own["ok"] is True,
    "export": lambda own: own["mix"] == "f16" and own["zeros"] >= own["zeros_kept"] > 0,
    "fit": lambda own: own["chosen"] in own["points"] and Path(own["saved"]).exists(),
    "reapply": lambda own: own["restored"] > 0 and own["saved"].endswith("again"),
    "evaluate": lambda own: own["rows"][0]["results"][0]["n"] == 2,
    "compare": lambda own: own["rows"][1]["results"][0]["difference"]["n"] == 3,
}


@pytest.mark.slow
def test_json_is_all_that_is_printed_and_quiet_prints_nothing(run: Run, calls: dict[str, list[Any]]) -> None:
    for command, words in calls.items():
        code, out, err = run(command, *words, "--json")
        assert code == 0, (command, err)
        assert EXPECTED[command](json.loads(out)), command
        assert run(command, *words, "--quiet") == (0, "", ""), command


def test_every_command_with_a_table_has_json_and_the_test_calls_it(calls: dict[str, list[Any]]) -> None:
    group = typer.main.get_command(app)
    own = {name: {o for p in c.params for o in p.opts} for name, c in group.commands.items()}  # type: ignore[attr-defined]
    assert {name for name, options in own.items() if "--json" in options} == set(COMMANDS)
    assert set(calls) == set(COMMANDS) - {*PROSE, "demo"}


def test_a_plan_as_json(run: Run, calls: dict[str, list[Any]], tmp_path: Path) -> None:
    words = [*calls["run"], "-o", tmp_path / "new", "--dry-run", "--json"]
    code, out, err = run("run", *words)
    assert code == 0, err
    assert "gsm8k_nll:3" in [job["name"] for job in json.loads(out)["plan"]["jobs"]]


def test_json_has_no_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    document(True, value=float("nan"), many=(1.5, float("inf")), place=Path("x"))
    assert json.loads(capsys.readouterr().out) == {"value": None, "many": [1.5, None], "place": "x"}
    document(False, value=1)
    assert not capsys.readouterr().out


def test_errors_are_said_when_quiet_and_logged(run: Run, model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    words = ("prune", model, "-o", tmp_path / "out", "--sparsity", "2", "--quiet", "--log-file", log)
    assert_refused(run(*words), "sparsity", tmp_path / "out")
    first, *_, last = log.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d causalprune .*prune {re.escape(str(model))} .*", first
    )
    assert "error: sparsity" in last
    refused = run("inspect", model, "--log-file", tmp_path / "no" / "log.txt")
    assert_refused(refused, "cannot write the log file", tmp_path / "no")
    assert run("inspect", model)[1], "the next command is not quiet"


@pytest.mark.usefixtures("warned")
def test_stages_and_warnings_are_logged(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    words = ("--on", "gsm8k_nll:9", "-o", tmp_path / "out.json", "--data-dir", data, "--log-file", log)
    code, out, err = run("evaluate", model, *words)
    assert code == 0, err
    assert out
    lines = [line[20:] for line in log.read_text(encoding="utf-8").splitlines()]
    warned = "warning: gsm8k, to measure: 9 examples asked for, 6 taken: all that it holds"
    ends = [lines.index(f"{stage}: done in 0 s") for stage in ("loading model", "gsm8k_nll:9")]
    assert ends[0] < lines.index(warned) < ends[1]
    assert warned in err.splitlines()


def test_a_warning_is_shown_once_in_a_command() -> None:
    for _ in range(2):
        voice.begin()
        assert [one_line(UserWarning("few\nexamples")) for _ in range(2)] == ["warning: few examples\n", ""]


def test_progress_is_logged_even_when_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("causalprune.core.progress.AT_ONCE", 0.01)
    monkeypatch.setattr("causalprune.core.progress.LOG_SECONDS", 0.01)
    own, log = Voice(), tmp_path / "log.txt"
    own.begin(silent=True, file=log)
    with own.stage("work") as progress:
        say(progress, note="going on", unit="steps")
        progress(100, 1000)
        while "100 of 1,000 steps" not in log.read_text(encoding="utf-8"):
            time.sleep(0.01)
    lines = [line[20:] for line in log.read_text(encoding="utf-8").splitlines()]
    assert "going on" in lines[1:3]
    assert lines[-1] == "work: done in 0 s"
    assert capsys.readouterr() == ("", "")


def test_every_variable_stands_in_the_reference() -> None:
    page = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")
    files = [
        *PACKAGE.rglob("*.py"),
        *(REPOSITORY / "tests").rglob("*.py"),
        *(REPOSITORY / "bench").glob("*.py"),
    ]
    texts = [path.read_text(encoding="utf-8") for path in files]
    found = {name for text in texts for name in re.findall(r"\bCAUSALPRUNE_[A-Z0-9]+", text)}
    assert "CAUSALPRUNE_DATA" in found
    assert not {name for name in found if f"`{name}`" not in page}


def test_every_command_stands_in_the_reference() -> None:
    page = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")
    assert [row for row in re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) if row in COMMANDS]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) >= set(COMMANDS)


def test_shares_are_measured_apart_and_merged(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    common = ("-t", "gsm8k", "-n", 3, "--data-dir", data)
    for shard in ("1/2", "2/2"):
        code, out, err = run("attribute", model, "-o", tmp_path / "out", *common, "--shard", shard)
        assert code == 0, err
        assert f"share {shard}" in out
    shares = [tmp_path / "out" / f"effects.{i}-of-2.json" for i in (1, 2)]
    code, out, err = run("merge", *shares, "-o", tmp_path / "merged.json")
    assert code == 0, err
    assert run("attribute", model, "-o", tmp_path / "whole", *common)[0] == 0
    values = [
        json.loads(p.read_text())["masked_nats"]
        for p in (tmp_path / "merged.json", tmp_path / "whole/effects.json")
    ]
    assert values[0] == values[1]
    assert run("merge", shares[0], "-o", tmp_path / "half.json")[0] == 2
    assert run("attribute", model, "-o", tmp_path / "bad", *common, "--shard", "half")[0] == 2


def test_the_syntax_of_other_packages_is_not_the_users_to_mend(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            main(["--version"])
        for folder in ("site-packages", "own"):
            compile("1 is 1", str(tmp_path / folder / "other.py"), "exec")
    assert [Path(str(own.filename)).parent.name for own in caught] == ["own"]
