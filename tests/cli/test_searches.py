"""Searches for circuits that were stopped, are planned, or are saved alone."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run, assert_refused
from tinydata import write_data, write_jsonl, write_model

from causalprune.circuits import load_circuit, save_circuit, sentences
from causalprune.circuits.curves import Value
from causalprune.circuits.finding import Search
from causalprune.cli import showing

QUICK = ("--estimator", "gradient", "--learn", 1, "--keep", 0.3, "--controls", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, its data, and files of problems."""
    folder = tmp_path_factory.mktemp("searches")
    write_data(folder / "data", rows=60)
    write_model(folder / "model")
    for name, count, more in (
        ("five", 5, {}),
        ("forty", 40, {}),
        ("pairs", 20, {"counterfactual": "0 + 1?"}),
    ):
        rows = [{"prompt": f"{i % 10} + {i}?", "target": f"It is {i}.", **more} for i in range(1, count + 1)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def find(run: Run, place: Path, output: str, *options: object) -> tuple[int, str, str]:
    words = ("circuit", place / "model", "-o", place / output, "--data-dir", place / "data")
    return run(*words, *options)


def test_a_stopped_search_is_reported_told_apart_and_overwritten(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    options = ("-t", "gsm8k:16", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "size", stopped)
        assert find(run, place, "stopped", *options)[0] == 130
    assert sorted(path.name for path in (place / "stopped").iterdir()) == ["gates", "scores"]
    code, _, err = run("report", place / "stopped")
    assert (code, "as what left scores has not finished" in err) == (2, True), err
    code, _, err = find(run, place, "stopped", *options, "--ablation", "mean")
    assert code == 2
    for words in ("(ablation was 'zero' and is now 'mean')", "delete the folder (`circuit --overwrite`"):
        assert words in err
    (moves,) = (place / "stopped" / "gates" / "1-1").glob("m*")
    moves.write_bytes(b"x")
    code, _, err = find(run, place, "stopped", *options)
    assert (code, "moves, kept of a stopped run, is damaged: delete" in err) == (2, True), err
    code, _, err = find(run, place, "stopped", *options, "--overwrite")
    assert code == 0, err
    code, _, err = find(run, place, "stopped", *options, "--batch-tokens", 600)
    assert (code, "(--batch-tokens)" in err) == (2, True), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("-t", "gsm8k:16", "--on", "{place}/five.jsonl_nll:100"),
            "5 problems to decide on (--on) are too few",
        ),
        (("-t", "gsm8k:16", "--on", "nothere.jsonl_nll:100"), "cannot read nothere.jsonl"),
        (
            (
                "-t",
                "{place}/pairs.jsonl",
                "--ablation",
                "counterfactual",
                "--on",
                "{place}/forty.jsonl_nll:20",
            ),
            "needs a counterfactual of every example",
        ),
        (("-t", "{place}/forty.jsonl:20", "--on", "{place}/forty.jsonl_nll"), "0 of 40 usable (40 "),
        (("-t", "{place}/forty.jsonl:20", "--on", "{place}/forty.jsonl_nll:30"), "10 of 40 usable (30 "),
    ],
)
def test_a_plan_refuses_problems_that_decide_as_the_search_does(
    run: Run, place: Path, options: tuple[str, ...], words: str
) -> None:
    own = [option.format(place=place) for option in options]
    for more in (("--dry-run",), ()):
        outcome = find(run, place, "none", *own, *more)
        assert_refused(outcome, words, place / "none")


def test_a_plan_counts_what_files_leave_for_either_side(run: Run, place: Path) -> None:
    own = ("-t", f"{place}/forty.jsonl:20", "--on", f"{place}/forty.jsonl_nll:21")
    code, out, err = find(run, place, "none", *own, "--dry-run", "--json")
    assert code == 0, err
    plan = {row["stage"]: row["problems"] for row in json.loads(out)["plan"]}
    assert (plan["scores"], plan["sizes"]) == (19, 21)


def test_a_circuit_saved_alone_names_no_folder_and_stays_where_it_is(run: Run, place: Path) -> None:
    alone = place / "alone"
    options = ("-t", f"{place}/forty.jsonl:20", *QUICK, "--save", alone)
    assert find(run, place, "saved", *options)[0] == 0
    file = alone / "causalprune.json"
    own = json.loads(file.read_text())["run"]["circuit"]
    assert str(place) not in json.dumps(own)
    assert own["model"] == "model"
    assert own["calibration"]["sources"] == {"forty.jsonl": 20}
    before = file.stat()
    code, _, err = find(run, place, "saved", *options)
    assert code == 0, err
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    outcome = find(run, place, "other", "-t", "gsm8k:16", *QUICK, "--save", alone)
    assert_refused(outcome, "alone exists", place / "other")


def test_where_there_is_no_f_it_is_called_none(run: Run, place: Path) -> None:
    assert find(run, place, "flat", "-t", "gsm8k:16", *QUICK)[0] == 0
    found, nothing = load_circuit(place / "flat"), Value(math.nan, math.nan, math.nan)
    chosen = replace(found.chosen, faithfulness=nothing)
    curve = replace(found.curve, points=(chosen,), cpr=nothing, cmd=nothing)
    table = showing.circuit(replace(found, chosen=chosen, curve=curve))
    assert list(table.columns[-1].cells) == ["none"]
    assert "CPR none, CMD none;" in str(table.caption)
    some = replace(chosen, faithfulness=Value(0.5, math.nan, math.nan))
    table = showing.circuit(replace(found, chosen=some, curve=replace(curve, points=(some,))))
    assert list(table.columns[-1].cells) == ["0.5 (no interval)"]
    tried = dict.fromkeys(("random_mean", "random_max", "greedy"), math.nan)
    save_circuit(replace(found, checks=found.checks | {"completeness": tried}), place / "flat.json")
    said = sentences(load_circuit(place / "flat.json"))
    assert "completeness: there is no f, as closing all units changes nothing" in said
