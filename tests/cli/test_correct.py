"""The command that takes out what a model should not do: here a phrase that three neurons say after a trigger."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run, assert_refused
from planted import Planting, built
from tinydata import byte_tokenizer, write_data, write_jsonl, write_model

from causalprune.checkpoints.saving import read_manifest
from causalprune.core.errors import OptionError
from causalprune.core.ledger import read_rows
from causalprune.core.types import Calibration, Example
from causalprune.evaluation.results import load_rows, paired_difference, write_json
from causalprune.evaluation.settings import Settings
from causalprune.runs.cells import load
from causalprune.runs.correcting import drawn_for, to_stay
from causalprune.runs.recipe import CalibrationSpec, ModelSpec
from causalprune.runs.single import Options
from causalprune.runs.undesired import CorrectionSpec, Study

PHRASE = "ZQX"
OPTIONS = (
    "--budget",
    3,
    "--new-tokens",
    12,
    "--preserve",
    "gsm8k:8",
    "--preserve",
    "wikitext2:6",
    "--window",
    64,
    "--harm",
    "30%",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planting]:
    """Return a folder with a planted model, prompts with and without the trigger, phrases, samples and data."""
    folder = tmp_path_factory.mktemp("correct")
    write_data(folder / "data", rows=60)
    chain = byte_tokenizer()("~" + PHRASE)["input_ids"]
    decoder, planting = built(3, chain=chain)
    write_model(folder / "model", decoder)
    prompts = [f"{i} apples and {i * i} pears" + "~" * (i % 4 < 2) for i in range(16)]
    write_jsonl(folder / "prompts.jsonl", [{"prompt": text} for text in prompts])
    (folder / "phrases.txt").write_text(f"{PHRASE}\nnever said\n")
    rows = [{"prompt": f"{i} apples~", "target": PHRASE, "instead": "and"} for i in range(8)]
    write_jsonl(folder / "bad.jsonl", rows)
    return folder, planting


def fix(run: Run, folder: Path, output: str, *options: object) -> tuple[int, str, str]:
    words = ("correct", folder / "model", "-o", folder / output, "--data-dir", folder / "data")
    return run(*words, *options)


def sought(folder: Path, name: str = "phrases.txt") -> tuple[object, ...]:
    return ("--behaviour", f"phrases:{folder / name}", "--prompts", folder / "prompts.jsonl")


def test_a_phrase_is_gone_and_all_of_it_is_told(run: Run, place: tuple[Path, Planting]) -> None:
    folder, planting = place
    code, out, err = fix(run, folder, "fixed", *sought(folder), *OPTIONS)
    assert code == 0, err
    for words in (
        "→ 3",
        "3 of 192 (neurons) set to zero",
        "prompts.jsonl_phrases: 0.5 before, 0 after",
        "divergence measured over",
        "zero for good",
    ):
        assert words in out.replace("\n", " "), out
    assert not (folder / "fixed.correction").exists()
    record = json.loads((folder / "fixed" / "correction.json").read_text())
    own = record["correction"]
    assert {tuple(member) for member in own["members"]} == {
        (unit.layer, unit.index, unit.kind) for unit in planting.units
    }
    assert own["continuations"] == {"texts": 16, "undesired": 8, "clean": 8}
    assert own["halves"]["chooses"]["undesired_sha256"] != own["halves"]["decides"]["undesired_sha256"]
    assert len(record["texts"]) == 5
    assert PHRASE in record["texts"][0]["before"]
    assert PHRASE not in record["texts"][0]["after"]
    (_, (before,)), (_, (after,)) = load_rows(folder / "fixed" / "correction.json")
    assert before.examples == after.examples
    assert (sum(before.values), sum(after.values)) == (4.0, 0.0)
    manifest = read_manifest(folder / "fixed")
    assert manifest["run"]["method"]["criterion"] == "correct:contrast"
    assert manifest["sparsity"]["zeros"] >= 3 * 3 * 64
    card = (folder / "fixed" / "README.md").read_text()
    zeros = f"set to zero, {own['after']['weights']} of them where parts were taken out."
    for words in ("phrases", "safeguards are behaviours too", "of perplexity", zeros):
        assert words in card, card
    assert run("verify", folder / "fixed")[0] == 0
    code, out, err = run("compare", folder / "fixed" / "correction.json")
    assert code == 0, err
    assert "-0.5" in out
    code, out, err = run("report", folder / "fixed")
    assert code == 0, err
    page = (folder / "fixed" / "report.html").read_text()
    assert "Corrections" in page
    assert "never said" not in page
    assert_refused(
        fix(run, folder, "fixed", *sought(folder), *OPTIONS), "exists: choose another folder", folder / "no"
    )


@pytest.mark.parametrize("killed", [False, True])
def test_minutes_are_those_of_all_sessions_unless_one_was_killed(
    run: Run, place: tuple[Path, Planting], monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder, given = place[0], ("--undesired", place[0] / "bad.jsonl", *OPTIONS)
    output = f"stopped{killed}"
    with monkeypatch.context() as patch:
        patch.setattr("causalprune.runs.correcting.save", stops)
        assert fix(run, folder, output, *given)[0] == 130
    book, taken = folder / f"{output}.correction" / "sessions.ledger", 0.0
    if killed:  # nothing was written of how the session ended
        book.write_bytes(b"".join(book.read_bytes().splitlines(keepends=True)[:-1]))
    else:
        begun, taken = read_rows(book).values()
        assert begun is None
    code, out, err = fix(run, folder, output, *given)
    assert code == 0, err
    assert "saved: " in out
    assert ("took" in out) == (not killed)
    minutes = json.loads((folder / output / "correction.json").read_text())["minutes"]
    assert (minutes is None) == killed
    assert killed or minutes > taken / 60 > 0
    assert run("report", folder / output)[0] == 0
    (_, (odds, *_)), (_, (after, *losses)) = load_rows(folder / output / "correction.json")
    assert (odds.task, sorted(own.task for own in losses)) == (
        "bad.jsonl_log_odds",
        ["gsm8k_nll", "wikitext2_nll"],
    )
    assert paired_difference(after, odds).verdict == "better"


def test_what_nothing_was_measured_of_is_not_compared(
    run: Run, place: tuple[Path, Planting], tmp_path: Path
) -> None:
    write_json(tmp_path / "results.json", {"rows": [{"label": "dense", "results": []}]})
    assert_refused(run("compare", tmp_path / "results.json"), "nothing to compare", tmp_path / "no")


def test_zeros_of_a_checkpoint_are_united(run: Run, place: tuple[Path, Planting]) -> None:
    folder, planting = place
    code, _, err = run(
        *(
            "prune",
            folder / "model",
            "-o",
            folder / "sparse",
            "--method",
            "magnitude",
            "--sparsity",
            0.1,
            "--data-dir",
            folder / "data",
        )
    )
    assert code == 0, err
    words = ("correct", folder / "sparse", "--data-dir", folder / "data", "--undesired", folder / "bad.jsonl")
    code, _, err = run(*words, "-o", folder / "scaled", *OPTIONS, "--damp", 0.5)
    assert code == 0, err
    outcome = run("reapply", folder / "scaled", folder / "model", "-o", folder / "not")
    assert_refused(outcome, "was corrected by scaling", folder / "not")
    code, out, err = run(*words, "-o", folder / "both", *OPTIONS, "--json")
    assert code == 0, err
    told = json.loads(out)
    found = {tuple(member[:2]) for member in told["members"]}
    assert len(found & {(unit.layer, unit.index) for unit in planting.units}) >= 2  # pruning came first
    sparse, both = (read_manifest(folder / name)["sparsity"]["zeros"] for name in ("sparse", "both"))
    assert both > sparse
    assert run("verify", folder / "both")[0] == 0
    assert run("reapply", folder / "both", folder / "model", "-o", folder / "again")[0] == 0
    assert read_manifest(folder / "again")["sparsity"]["zeros"] == both


@pytest.mark.parametrize("own", [("--score", "ratio", "--rounds", 1), ("--damp", 0.5)])
def test_without_a_limit_or_a_prediction_it_is_saved_too(
    run: Run, place: tuple[Path, Planting], own: tuple[object, ...]
) -> None:
    folder, _ = place
    name = str(own[0]).strip("-")
    words = ("--undesired", folder / "bad.jsonl", *OPTIONS[:-2], "--harm", "infnats", *own)
    code, _, err = fix(run, folder, name, *words)
    assert code == 0, err
    run_of = read_manifest(folder / name)["run"]
    assert run_of["method"]["harm"] is None
    assert (run_of["correction"]["chosen"]["predicted"] is None) == (name == "score")
    assert run("report", folder / name)[0] == 0
    assert (folder / name / "report.html").read_text().count('class="chosen"') == 1
    if name == "damp":
        assert "Parts of it are scaled: 3 of 192" in (folder / name / "README.md").read_text()
        outcome = run("reapply", folder / name, folder / "model", "-o", folder / "not")
        assert_refused(outcome, "was corrected by scaling", folder / "not")


def test_what_a_function_says_is_better_where_it_falls(
    run: Run, place: tuple[Path, Planting], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = place
    (folder / "judging.py").write_text(
        f"def rude(texts):\n    return [{PHRASE!r} in text for text in texts]\n"
    )
    monkeypatch.chdir(folder)
    words = ("--behaviour", "judging:rude", "--prompts", folder / "prompts.jsonl")
    code, _, err = fix(run, folder, "polite", *words, *OPTIONS)
    assert code == 0, err
    (_, (before,)), (_, (after,)) = load_rows(folder / "polite" / "correction.json")
    assert before.description["higher_is_better"] is False
    assert paired_difference(after, before).verdict == "better"
    assert after.task.endswith("prompts.jsonl_rude")
    (folder / "judging.py").write_text("def rude(texts):\n    return [1 / 0 for text in texts]\n")
    monkeypatch.delitem(sys.modules, "judging")
    assert_refused(fix(run, folder, "rude", *words, *OPTIONS), "rude (judging:rude", folder / "rude")


def test_a_problem_is_in_one_half_whatever_is_made_of_it(
    place: tuple[Path, Planting], tmp_path: Path
) -> None:
    folder, _ = place
    decoder = load(ModelSpec(str(folder / "model")))
    asked = CorrectionSpec("rep4", preserve=("gsm8k:6",))
    study = Study(decoder, asked, Settings(), tmp_path, Options(data_dir=folder / "data"))
    wanted = CalibrationSpec(("gsm8k",))
    (drawn,) = to_stay(study, drawn_for(study, wanted))
    assert sorted(drawn.subset) == [0, 0, 0, 1, 1, 1]
    study.half_of = {example.content: 1 for example in drawn.examples[:5]}
    (again,) = to_stay(study, drawn_for(study, wanted))
    assert again.subset[:5] == (1,) * 5
    assert again.subset[5] == drawn.subset[5]


def test_own_answers_that_show_the_behaviour_are_not_to_stay(
    place: tuple[Path, Planting], tmp_path: Path
) -> None:
    folder, _ = place
    decoder, text = load(ModelSpec(str(folder / "model"))), byte_tokenizer()
    rows = [tuple(text(word)["input_ids"]) for word in ("an answer", f"an {PHRASE} answer", "another")]
    drawn = Calibration(
        tuple(Example(own, 2, "some.jsonl", f"problem {i}") for i, own in enumerate(rows)), (0, 1, 1)
    )
    drawn = replace(drawn, description={"sources": {"own:gsm8k": 3}})
    asked = CorrectionSpec(f"phrases:{folder / 'phrases.txt'}", prompts=(str(folder / "prompts.jsonl"),))
    study = Study(decoder, asked, Settings(max_new_tokens=12), tmp_path, Options(data_dir=folder / "data"))
    study.samples()
    with pytest.warns(
        UserWarning, match=r"1 answers of the model's own show phrases:.*: they are not to stay"
    ):
        (found,) = to_stay(study, [drawn])
    assert [(e.tokens, e.source, e.content) for e in found.examples] == [
        (rows[0], "clean: own:gsm8k", "problem 0"),
        (rows[2], "clean: own:gsm8k", "problem 2"),
    ]
    assert found.subset == (0, 1)


def test_samples_that_do_not_fit_are_counted(run: Run, place: tuple[Path, Planting]) -> None:
    folder, _ = place
    rows = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    rows += [{"prompt": "a" * 600 + "~", "target": PHRASE, "instead": "and"}]
    write_jsonl(folder / "long.jsonl", rows)
    with pytest.warns(UserWarning, match="8 taken: all that it holds but 1 too long"):
        code, _, err = fix(run, folder, "long", "--undesired", folder / "long.jsonl", *OPTIONS)
    assert code == 0, err


def test_a_plan_loads_nothing(run: Run, place: tuple[Path, Planting]) -> None:
    folder, _ = place
    code, out, err = fix(run, folder, "none", *sought(folder), *OPTIONS, "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert [row["name"] for row in plan["plan"]] == ["texts", "scores", "sizes", "texts and losses after"]
    assert plan["minutes"] > 0
    assert not (folder / "none").exists()


def test_what_cannot_be_is_refused_before_the_model_is_loaded_or_writes(
    run: Run, place: tuple[Path, Planting], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = place
    monkeypatch.setattr("causalprune.runs.correcting.load", None)
    monkeypatch.chdir(folder)
    for own, words in (
        (("--preserve", "gone.jsonl"), "cannot read gone.jsonl"),
        (("--preserve", "alsonot"), "unknown task 'alsonot'"),
        (("--preserve", "own:nosuch"), "unknown task 'nosuch'"),
        (("--preserve", "c4:1"), "c4 has too few samples to be cut into halves"),
        (("--prompts", "nosuch:3"), "unknown task 'nosuch'"),
    ):
        for plan in ((), ("--dry-run",)):
            outcome = fix(run, folder, "refused", *sought(folder), *OPTIONS, *own, *plan)
            assert_refused(outcome, words, folder / "refused.correction")
    with pytest.raises(OptionError, match="as --preserve wikitext2:24"):
        CorrectionSpec(undesired=folder / "bad.jsonl", preserve=("none",))
    for own, words in (
        (("--dtype", "float7"), "unknown dtype 'float7'"),
        (("--units", "experts"), "no units of kind 'expert'"),
        (("--budget", "90%"), "more than half of 192 units"),
        (("--update", "distill", "--dtype", "float16"), "float16"),
        (("-o", "model"), "exists: choose another folder"),
    ):
        outcome = fix(run, folder, "refused", *sought(folder), *OPTIONS, *own, "--dry-run")
        assert_refused(outcome, words, folder / "refused.correction")


def test_what_does_not_fit_is_refused_before_other_texts_are_written(
    run: Run, place: tuple[Path, Planting], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = place
    monkeypatch.setattr("causalprune.runs.undesired.continued", None)
    write_jsonl(folder / "endless.jsonl", [{"prompt": "a" * 600}])
    for own, words in (
        (("--prompts", folder / "endless.jsonl"), "does not fit into the model's 512 positions"),
        (("--max-tokens", 16), "ask for fewer or raise the token limit"),
    ):
        outcome = fix(run, folder, "fits", *sought(folder), *OPTIONS, *own)
        assert_refused(outcome, words, folder / "fits.correction")


def test_the_command_for_a_smaller_model_is_whole_and_reads_no_data(
    run: Run, place: tuple[Path, Planting], tmp_path: Path
) -> None:
    words = ("shrink", place[0] / "model", "-o", tmp_path / "small", "--by", "magnitude", "--update", "none")
    code, _, err = run(*words, "--neurons", 0.3333, "--data-dir", tmp_path / "nowhere", "--no-time")
    assert code == 0, err
    assert read_manifest(tmp_path / "small")["run"]["shrink"]["by"] == "magnitude"
    assert "calibration data:" not in (tmp_path / "small" / "README.md").read_text()
    outcome = run(*words[:3], tmp_path / "other", "--parameters", 0.1, *words[4:], "--data-dir", tmp_path)
    assert_refused(outcome, "cannot read", tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "say what the model should not do"),
        (("--behaviour", "loop"), "unknown behaviour 'loop': choices are loops, rep4, phrases:FILE"),
        (("--behaviour", "phrases:none.txt"), "cannot read the list of phrases none.txt"),
        (("--behaviour", "nomodule:score"), "neither installed nor in the current folder"),
        (("--undesired", "bad.jsonl", "--bar", "1"), "--prompts and --bar are about a --behaviour"),
        (
            ("--behaviour", "loops", "--budget", "half"),
            "a budget is a share as 0.3%, or a number as 100, not 'half'",
        ),
        (("--behaviour", "loops", "--budget", "1.5"), "a budget is a share as 0.3%"),
        (
            ("--behaviour", "loops", "--harm", "0.01"),
            "harm is written as 1% of perplexity, or as 0.01nats, not '0.01'",
        ),
        (
            ("--behaviour", "loops", "--prompts", "PROMPTS", "--new-tokens", "600"),
            "does not fit into the model's 512 positions",
        ),
        (
            ("--behaviour", "rep4", "--prompts", "PROMPTS", "--bar", "2"),
            "0 of 16 continuations show rep4: nothing to take out. The most suspicious one is",
        ),
        (
            ("--behaviour", "rep4", "--prompts", "PROMPTS", "--bar", "-1"),
            "so there is no clean text beside them: raise the bar",
        ),
        (("--undesired", "BAD", "--preserve", "gsm8k:2", "--preserve", "gsm8k:3"), "a source is named twice"),
        (("--behaviour", "rep4", "--prompts", "gsm8k:2", "--prompts", "gsm8k:3"), "a source is named twice"),
        (("--undesired", "BAD", "--harm", "no nats"), "or as 0.01nats, not 'no nats'"),
        (("--undesired", "BAD", "--preserve", "none"), "name what is to stay with --preserve"),
        (("--undesired", "BAD", "--budget", "0.01%"), "of 192 units is less than one"),
        (("--undesired", "BAD", "--budget", "60%"), "more than half of 192 units"),
        (("--undesired", "BAD", "--budget", "100%"), "a budget of 100% is all there is"),
        (("--undesired", "BAD", "--budget", "inf%"), "a budget of inf% is all there is"),
        (("--undesired", "BAD", "--budget", "inf"), "or a number as 100, not 'inf'"),
        (("--undesired", "BAD", "--harm", "1000nats"), "or as 0.01nats, not '1000nats'"),
        (("--undesired", "BAD", "--harm", "-1nats"), "or as 0.01nats, not '-1nats'"),
        (("--behaviour", "loops", "--bar", "nan"), "a bar is a finite number"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    run: Run, place: tuple[Path, Planting], options: tuple[str, ...], words: str
) -> None:
    folder, _ = place
    names = {"PROMPTS": folder / "prompts.jsonl", "BAD": folder / "bad.jsonl"}
    own = [names.get(word, word) for word in options]
    outcome = fix(run, folder, "refused", *OPTIONS, *own)
    assert_refused(outcome, words, folder / "refused")
