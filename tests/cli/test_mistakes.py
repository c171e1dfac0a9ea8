"""What users get wrong on the command line: one line that names the thing and the way out, before long work."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run, assert_refused
from tinydata import tiny_decoder

from causalprune.checkpoints.saving import read_manifest
from causalprune.core.errors import OptionError
from causalprune.evaluation.results import read_json
from causalprune.pruning.methods import Method
from causalprune.runs.recipe import CalibrationSpec


@pytest.mark.thorough
def test_a_folder_without_a_tokenizer(run: Run, data: Path, tmp_path: Path) -> None:
    tiny_decoder().model.save_pretrained(tmp_path / "bare")
    common = ("--data-dir", data, "-o")
    for command in (
        ("prune", tmp_path / "bare", "-n", 4, *common, tmp_path / "out"),
        ("attribute", tmp_path / "bare", "-n", 4, *common, tmp_path / "out"),
        ("shrink", tmp_path / "bare", "-n", 4, "--layers", 0.5, *common, tmp_path / "out"),
        ("evaluate", tmp_path / "bare", "--on", "gsm8k_nll:2", *common, tmp_path / "out.json"),
        ("evaluate", tmp_path / "bare", "--on", "wikitext2_ppl:200", *common, tmp_path / "out.json"),
        ("evaluate", tmp_path / "bare", "--on", "strategyqa:2", *common, tmp_path / "out.json"),
    ):
        assert_refused(run(*command), "no tokenizer", command[-1])
    code, _, err = run("prune", tmp_path / "bare", "--method", "magnitude", "-o", tmp_path / "out")
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-t", "own:wikitext2"), "running text, with nothing to answer"),
        (("-t", "wikitext2", "--preserve", "wikitext2:3"), "named twice"),
        (("--preserve", "own:c4"), "running text, with nothing to answer"),
        (("--preserve", "none", "--preserve-share", "0.5"), "name a source, or leave it out"),
        (("--preserve", "c4", "--preserve-share", "0"), "above 0 and at most 1"),
        (("--preserve", "c4", "--general", "0.1"), "--general is the old word for --preserve"),
        (("--preserve", "c4", "--objective", "task"), "--objective is the old word for --preserve"),
        (("--damping", "nan"), "damping must be a number of at least 0"),
        (("--damping", "-1"), "damping must be a number of at least 0"),
        (("--stream", "--method", "causal+graded"), "leave out --stream, or take another method"),
        (("--objective", "mixed"), "balanced"),
    ],
)
def test_options_of_prune(
    run: Run, model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    common = ("-o", tmp_path / "out", "-n", 4, "--data-dir", data)
    assert_refused(run("prune", model, *common, *options), words, tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ("attribute", "nothing", "--workers", 3),
            "--workers 3 are of the executor ray: pass --executor ray too",
        ),
        (("export", "nothing", "--batch-tokens", 8), "No such option: --batch-tokens"),
        (("overlap", "one", "two", "--batch-tokens", 8), "No such option: --batch-tokens"),
    ],
)
def test_no_option_is_taken_and_ignored(
    run: Run, tmp_path: Path, given: tuple[object, ...], words: str
) -> None:
    assert_refused(run(*given, "-o", tmp_path / "out"), words, tmp_path / "out")


@pytest.mark.parametrize("option", [("--by", "size"), ("--update", "train")])
def test_choices_of_shrink_are_checked_before_a_model_is_loaded(
    run: Run, tmp_path: Path, option: tuple[str, str]
) -> None:
    outcome = run("shrink", tmp_path / "nothing", "-o", tmp_path / "out", *option)
    assert_refused(outcome, option[0], tmp_path / "out")


@pytest.mark.thorough
def test_a_run_needs_a_folder(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    recipe = {
        "model": {"name": str(model)},
        "calibration": {"task": ["gsm8k"], "n": 4},
        "methods": ["wanda"],
        "sparsities": [0.5],
        "on": ["gsm8k_nll:2"],
        "general_text": "none",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "out").write_text("a file")
    outcome = run("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--data-dir", data)
    assert_refused(outcome, "is a file", tmp_path / "new")
    assert (tmp_path / "out").read_text() == "a file"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "damping": -0.1}))
    outcome = run("run", tmp_path / "recipe.yaml", "-o", tmp_path / "new", "--data-dir", data)
    assert_refused(outcome, "damping", tmp_path / "new")
    for damping, code in ((0.02, 0), (0.02, 0), (0.03, 2)):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "damping": damping}))
        found = run("run", tmp_path / "recipe.yaml", "-o", tmp_path / "new", "--data-dir", data)
        assert found[0] == code, found
    assert "damping was 0.02" in found[2]


def test_a_task_file_without_data(run: Run, model: Path, tmp_path: Path) -> None:
    task = {"task": "own", "output_type": "multiple_choice", "doc_to_text": "x", "metadata": None}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    outcome = run("evaluate", model, "--on", tmp_path / "own.yaml", "-o", tmp_path / "out.json")
    assert_refused(outcome, "names its data", tmp_path / "out.json")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("option", "text"),
    [(("--preserve", "wikitext2"), 2), (("--preserve", "wikitext2:3"), 3), (("--preserve", "none"), 0)],
)
def test_what_is_preserved_comes_on_top_in_every_command(
    run: Run, model: Path, data: Path, tmp_path: Path, option: tuple[str, ...], text: int
) -> None:
    common = ("-n", 8, "--max-tokens", 300, "--data-dir", data, *option)
    code, _, err = run("prune", model, "-o", tmp_path / "zeros", "--method", "wanda", *common)
    assert code == 0, err
    code, _, err = run("shrink", model, "-o", tmp_path / "small", "--layers", 0.5, *common)
    assert code == 0, err
    for name in ("zeros", "small"):
        sources = read_manifest(tmp_path / name)["run"]["calibration"]["sources"]
        assert sources == {"gsm8k": 8, **({"wikitext2": text} if text else {})}


@pytest.mark.parametrize(
    ("option", "kept"),
    [
        (("--objective", "balanced"), {"preserve": ("wikitext2",), "preserve_share": 0.25}),
        (("--general", "0.5"), {"preserve": ("wikitext2",), "preserve_share": 0.5}),
        (("--general", "0.5", "--objective", "task"), {"preserve": ("wikitext2",), "preserve_share": 0.5}),
        (("--objective", "task"), {"preserve": ()}),
    ],
)
def test_old_words_for_general_text_mean_the_new_ones(
    run: Run, model: Path, option: tuple[str, ...], kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[CalibrationSpec] = []
    monkeypatch.setattr("causalprune.runs.single.prepared", lambda *given: asked.append(given[1]) or stop())
    with pytest.warns(FutureWarning, match=f"{option[0]} is an old word.*on top of the task's") as seen:
        code, _, err = run("prune", model, "-o", model / "out", "-n", 8, *option)
    assert code == 130, err
    assert len(seen) == 1
    assert asked == [CalibrationSpec(("gsm8k",), 8, **kept)]


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.thorough
@pytest.mark.usefixtures("warned")
def test_old_words_are_hidden_and_warned_of_in_one_line(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    out = run("prune", "--help")[1]
    assert "--preserve" in out
    assert not {"--general", "--objective"} & set(out.split())
    common = ("-n", 4, "--max-tokens", 300, "--data-dir", data, "--method", "wanda")
    code, _, err = run("prune", model, "-o", tmp_path / "out", *common, "--general", "0.5")
    assert code == 0
    (line,) = (line for line in err.splitlines() if line.startswith("warning"))  # beside progress
    assert line.startswith("warning: --general is an old word")


@pytest.mark.thorough
def test_evaluate_takes_its_old_word_without_a_word(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    for name, option in (("new", "--on"), ("old", "-t"), ("older", "--task")):
        common = ("-o", tmp_path / name, "--data-dir", data)
        assert run("evaluate", model, option, "gsm8k_nll:2", option, "strategyqa_nll:2", *common)[0] == 0
    found = [read_json(tmp_path / name)["results"] for name in ("new", "old", "older")]
    assert [[(one["task"], one["values"]) for one in own] for own in found[1:]] == [
        [(one["task"], one["values"]) for one in found[0]]
    ] * 2
    assert_refused(run("evaluate", model, "-o", tmp_path / "none"), "say what with --on", tmp_path / "none")
    assert "--task" not in run("evaluate", "--help")[1]


def test_shares_of_what_is_preserved() -> None:
    spec = CalibrationSpec(("gsm8k",), 3, preserve=("wikitext2",), preserve_share=0.1)
    assert spec.counts() == {"gsm8k": 3, "wikitext2": 1}
    several = CalibrationSpec(("gsm8k:8", "strategyqa:4"), preserve=("wikitext2", "c4:5"))
    assert several.counts() == {"gsm8k": 8, "strategyqa": 4, "wikitext2": 3, "c4": 5}
    assert CalibrationSpec(("gsm8k",), 3).counts() == {"gsm8k": 3}
    assert CalibrationSpec(("gsm8k",), preserve=("none",)) == CalibrationSpec(("gsm8k",), preserve=())


def test_what_trains_preserves_text_of_its_own_unless_something_is_said() -> None:
    spec = CalibrationSpec(("gsm8k",), 48)
    assert spec.settled(own=False) == CalibrationSpec(("gsm8k",), 48, preserve=())
    own = spec.settled(own=True)
    assert own.preserve == ("own",)
    assert own.counts(8 * 512) == {"gsm8k": 48, "own": 2}  # a quarter of the tokens, in pieces of 512
    assert own.counts(10) == {"gsm8k": 48, "own": 1}
    for said in (("none",), ("c4",), ("own:3",)):
        spec = CalibrationSpec(("gsm8k",), 48, preserve=said)
        assert spec.settled(own=True) == spec
    assert CalibrationSpec(("own:3",), 48).settled(own=True).preserve == ()


def test_damping_that_is_no_number() -> None:
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="damping"):
            Method("sparsegpt", 0.5, damping=damping)


def test_a_path_that_looks_like_a_name_says_how_to_write_it(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "problems.txt").write_text("{}")
    for source in ("mine", "problems.txt"):
        words = ("--data-dir", data, "-t", source, "-n", "3")
        said = f"{source} is no data set of ours: a folder is written ./{source}, and a file ends in .jsonl"
        assert said in run("prune", model, "-o", "out", "--method", "wanda", *words)[2]
        assert (
            said in run("evaluate", model, "--on", f"{source}_nll", "-o", "own.json", "--data-dir", data)[2]
        )
