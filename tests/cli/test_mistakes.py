"""What users get wrong on the command line: one line that names the thing and the way out, before long work."""

from pathlib import Path

import pytest
import yaml
from conftest import Run, assert_refused
from tinydata import tiny_decoder

from causalprune.checkpoints.saving import read_manifest
from causalprune.core.errors import OptionError
from causalprune.pruning.methods import Method
from causalprune.runs.recipe import CalibrationSpec


def test_a_folder_without_a_tokenizer(run: Run, data: Path, tmp_path: Path) -> None:
    tiny_decoder().model.save_pretrained(tmp_path / "bare")
    common = ("--data-dir", data, "-o")
    for command in (
        ("prune", tmp_path / "bare", "-n", 4, *common, tmp_path / "out"),
        ("attribute", tmp_path / "bare", "-n", 4, *common, tmp_path / "out"),
        ("shrink", tmp_path / "bare", "-n", 4, "--layers", 0.5, *common, tmp_path / "out"),
        ("evaluate", tmp_path / "bare", "-t", "gsm8k_nll:2", *common, tmp_path / "out.json"),
        ("evaluate", tmp_path / "bare", "-t", "wikitext2_ppl:200", *common, tmp_path / "out.json"),
        ("evaluate", tmp_path / "bare", "-t", "strategyqa:2", *common, tmp_path / "out.json"),
    ):
        assert_refused(run(*command), "no tokenizer", command[-1])
    code, _, err = run("prune", tmp_path / "bare", "--method", "magnitude", "-o", tmp_path / "out")
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-t", "own:wikitext2"), "running text, with nothing to answer"),
        (("-t", "wikitext2", "--objective", "balanced"), "wikitext2 is general text itself"),
        (("--damping", "nan"), "damping must be a number of at least 0"),
        (("--damping", "-1"), "damping must be a number of at least 0"),
        (("--stream",), "leave out --stream, or take another method"),
        (("--objective", "mixed"), "balanced"),
    ],
)
def test_options_of_prune(
    run: Run, model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    common = ("-o", tmp_path / "out", "-n", 4, "--data-dir", data)
    assert_refused(run("prune", model, *common, *options), words, tmp_path / "out")


@pytest.mark.parametrize("option", [("--by", "size"), ("--update", "train")])
def test_choices_of_shrink_are_checked_before_a_model_is_loaded(
    run: Run, tmp_path: Path, option: tuple[str, str]
) -> None:
    outcome = run("shrink", tmp_path / "nothing", "-o", tmp_path / "out", *option)
    assert_refused(outcome, option[0], tmp_path / "out")


def test_a_run_needs_a_folder(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    recipe = {
        "model": {"name": str(model)},
        "calibration": {"sources": ["gsm8k"], "n": 4},
        "methods": ["wanda"],
        "sparsities": [0.5],
        "tasks": ["gsm8k_nll:2"],
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
    outcome = run("evaluate", model, "-t", tmp_path / "own.yaml", "-o", tmp_path / "out.json")
    assert_refused(outcome, "names its data", tmp_path / "out.json")


@pytest.mark.parametrize(
    ("option", "text"), [(("--objective", "balanced"), 2), (("--general", "0.5"), 4), ((), 0)]
)
def test_general_text_takes_its_share_of_every_command(
    run: Run, model: Path, data: Path, tmp_path: Path, option: tuple[str, ...], text: int
) -> None:
    common = ("-n", 8, "--max-tokens", 300, "--data-dir", data, *option)
    code, _, err = run("prune", model, "-o", tmp_path / "zeros", "--method", "wanda", *common)
    assert code == 0, err
    code, _, err = run("shrink", model, "-o", tmp_path / "small", "--layers", 0.5, *common)
    assert code == 0, err
    for name in ("zeros", "small"):
        sources = read_manifest(tmp_path / name)["run"]["calibration"]["sources"]
        assert sources == {"gsm8k": 8 - text, **({"wikitext2": text} if text else {})}


def test_a_share_of_general_text_is_at_least_one_example() -> None:
    assert CalibrationSpec(("gsm8k",), 3, general=0.1).counts() == {"gsm8k": 2, "wikitext2": 1}
    assert CalibrationSpec(("gsm8k:3",), general=0.1).counts() == {"gsm8k": 3, "wikitext2": 1}
    assert CalibrationSpec(("gsm8k",), 3).counts() == {"gsm8k": 3}


def test_damping_that_is_no_number() -> None:
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="damping"):
            Method("sparsegpt", 0.5, damping=damping)
