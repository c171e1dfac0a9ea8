"""Several draws of the calibration examples: a run for each, and means over them with their spread."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run

from causalprune.core.errors import MismatchError
from causalprune.core.types import EvalResult
from causalprune.evaluation.results import averaged, headline, load_rows, paired_difference
from causalprune.runs import draws
from causalprune.runs.recipe import CalibrationSpec, ModelSpec, Recipe

LABELS = ["dense", "wanda-row-0.5"]


@pytest.fixture(scope="module")
def recipe(model: Path) -> Recipe:
    calibration = CalibrationSpec(("gsm8k",), n=6, seed=3)
    on = ("gsm8k_nll:4", "strategyqa")
    return Recipe(ModelSpec(str(model)), calibration, ("wanda",), (0.5,), on, general_text="none")


@pytest.mark.thorough
def test_means_are_over_draws_and_intervals_over_problems(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    draws.run_draws(recipe, 3, tmp_path, data_dir=data)
    names = [f"seed-{seed}" for seed in (3, 4, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draws.json", *names]
    alone = [dict(load_rows(tmp_path / name)) for name in names]
    means = dict(load_rows(tmp_path / "draws.json"))
    assert list(means) == LABELS
    for label, results in means.items():
        for i, mean in enumerate(results):
            own = [rows[label][i] for rows in alone]
            assert headline(mean) == pytest.approx(statistics.fmean(map(headline, own)))
            assert mean.description["spread"] == pytest.approx(
                statistics.stdev(map(headline, own)), abs=1e-12
            )
            assert (mean.description["spread"] < 1e-9) == (label == "dense" or mean.values == own[0].values)
    change = [paired_difference(rows["wanda-row-0.5"][0], rows["dense"][0]) for rows in alone]
    mean = paired_difference(means["wanda-row-0.5"][0], means["dense"][0])
    assert mean.difference == pytest.approx(statistics.fmean(one.difference for one in change))
    assert mean.n == 4


@pytest.mark.thorough
def test_draws_go_on_where_they_were(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done = draws.run, list[str]()

    def stops(own: Recipe, folder: Path, **options: Any) -> Any:
        if folder.name == "seed-4":
            raise KeyboardInterrupt
        return run(own, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(draws, "run", stops)
        with pytest.raises(KeyboardInterrupt):
            draws.run_draws(recipe, 2, tmp_path / "own", data_dir=data)
    monkeypatch.setattr("causalprune.runs.cells.evaluate", counted(done))
    draws.run_draws(recipe, 2, tmp_path / "own", data_dir=data)
    assert done == ["gsm8k_nll:4", "strategyqa"] * 2, "those of the second draw alone"


def test_one_draw_and_several_do_not_share_a_folder(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    small = dataclasses.replace(recipe, on=("gsm8k_nll:4",))
    draws.run(small, tmp_path / "one", data_dir=data)
    with pytest.raises(MismatchError, match=r"holds a run on one draw: .* leave out --seeds"):
        draws.run_draws(small, 2, tmp_path / "one", data_dir=data)
    draws.run_draws(small, 2, tmp_path / "two", data_dir=data)
    with pytest.raises(
        MismatchError, match=r"holds runs on several draws \(--seeds\): choose another folder"
    ):
        draws.run(small, tmp_path / "two", data_dir=data)


def counted(calls: list[str]) -> Any:
    """Return what takes the place of `evaluate` and notes what it measures."""
    from causalprune.evaluation.measures import evaluate

    def evaluates(decoder: Any, tasks: list[str], *rest: Any, **options: Any) -> Any:
        calls.append(tasks[0])
        return evaluate(decoder, tasks, *rest, **options)

    return evaluates


@pytest.mark.thorough
def test_the_command_shows_means_and_plans_as_many_runs(
    run: Run, model: Path, data: Path, tmp_path: Path
) -> None:
    own = {
        "model": {"name": str(model)},
        "calibration": {"task": ["gsm8k"], "n": 6},
        "methods": ["magnitude"],
        "sparsities": [0.5],
        "on": ["gsm8k_nll:3"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(own))
    given = (tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--data-dir", data)
    plans = [
        json.loads(run("run", *given, "--dry-run", "--json", *more)[1])["plan"]
        for more in ((), ("--seeds", 2))
    ]
    assert [job["tokens"] for job in plans[1]["jobs"]] == [2 * job["tokens"] for job in plans[0]["jobs"]]
    code, out, err = run("run", *given, "--seeds", 2)
    assert code == 0, err
    assert "mean ± standard deviation of 2 draws" in " ".join(out.split())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "seed-0" in page
    assert "--seeds 2" in page
    code, out, err = run("compare", tmp_path / "out" / "draws.json", "--json")
    assert code == 0, err
    assert run("compare", tmp_path / "out", "--json")[:2] == (0, out), "the folder will do"
    measured = json.loads(out)["rows"][1]["results"][0]
    assert (measured["draws"], measured["spread"]) == (2, 0.0), "magnitude looks at no examples"


def test_draws_on_other_examples_are_not_averaged() -> None:
    one = EvalResult("t", "accuracy", (1.0, 0.0), (1.0, 1.0), ("a", "b"))
    assert averaged([one, dataclasses.replace(one, values=(0.0, 0.0))]).values == (0.5, 0.0)
    with pytest.raises(MismatchError):
        averaged([one, dataclasses.replace(one, examples=("a", "c"))])
