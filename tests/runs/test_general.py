"""General text that runs measure though nobody named it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tinydata import tiny_decoder, write_model

import causalprune as cp
from causalprune.checkpoints import embedded
from causalprune.checkpoints.saving import save
from causalprune.core.errors import DataError, MismatchError
from causalprune.core.ledger import Ledger, read_rows
from causalprune.core.types import EvalResult
from causalprune.evaluation import pieces, written
from causalprune.evaluation.results import load_rows
from causalprune.runs import cells, general, sweeping
from causalprune.runs import study as running
from causalprune.runs.general import with_general_text
from causalprune.runs.plans import plan
from causalprune.runs.recipe import CalibrationSpec, ModelSpec, Recipe
from causalprune.runs.traces import calibrated

OWN = ("own_ppl:96", "own_kl:96")


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep texts apart, and short."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(written, "PIECE", 24)
    monkeypatch.setattr(general, "TOKENS", 96)


def recipe(model: Path, **changes: Any) -> Recipe:
    calibration = CalibrationSpec(("gsm8k",), n=6, subsets=3)
    own = Recipe(ModelSpec(str(model)), calibration, ("magnitude",), (0.5,), ("gsm8k_nll:4",))
    return dataclasses.replace(own, **changes)


def tasks(folder: Path) -> list[list[str]]:
    return [[result.task for result in results] for _, results in load_rows(folder)]


def test_a_run_measures_text_that_the_model_writes(model: Path, data: Path, tmp_path: Path) -> None:
    record = running.run(recipe(model), tmp_path / "run", data_dir=data)
    (_, dense), (_, pruned) = load_rows(tmp_path / "run")
    assert [r.task for r in dense] == [r.task for r in pruned] == ["gsm8k_nll", "own_ppl", "own_kl"]
    assert set(dense[2].values) == {0.0}
    assert all(value > 0 for value in pruned[2].values)
    assert pruned[1].examples == dense[1].examples
    assert [bool(r.description.get("added")) for r in pruned] == [False, True, True]
    assert record["recipe"]["on"] == ("gsm8k_nll:4", *OWN)
    assert read_rows(tmp_path / "run" / "results.ledger")["general_text"] == list(OWN)


@pytest.mark.parametrize("change", [{"general_text": "none"}, {"on": ("gsm8k_nll:4", "own_kl:48")}])
def test_a_recipe_has_the_last_word(change: dict[str, Any], model: Path, data: Path, tmp_path: Path) -> None:
    wanted = recipe(model, **change)
    assert with_general_text(wanted, tmp_path / "run", data) == wanted
    running.run(wanted, tmp_path / "run", data_dir=data)
    named = [task.partition(":")[0] for task in wanted.on]
    assert tasks(tmp_path / "run") == [named] * 2
    added = running.run(recipe(model), tmp_path / "run", data_dir=data)  # it may change its mind
    assert [r["task"] for r in added["rows"][1]["results"]] == ["gsm8k_nll", "own_ppl", "own_kl"]


def test_a_method_that_preserves_more_does_not_change_examples_unsaid(
    model: Path, data: Path, tmp_path: Path
) -> None:
    first = recipe(model, general_text="none")
    running.run(first, tmp_path / "run", data_dir=data)
    more = Recipe(first.model, CalibrationSpec(("gsm8k",), n=6), ("magnitude", "causal"), (0.5,), first.on)
    more = dataclasses.replace(more, general_text="none")
    with pytest.raises(
        MismatchError, match=r"begun with nothing to preserve, .* with own: .*`preserve: \[none\]`"
    ):
        running.run(more, tmp_path / "run", data_dir=data)
    same = dataclasses.replace(more.calibration, preserve=("none",))
    record = running.run(dataclasses.replace(more, calibration=same), tmp_path / "run", data_dir=data)
    assert [row["label"] for row in record["rows"]] == ["dense", "magnitude-matrix-0.5", "causal-matrix-0.5"]


def test_text_of_its_own_is_named_in_python(data: Path) -> None:
    both = cp.calibrate(tiny_decoder(), ["gsm8k:6", "own:3"], n=None, data_dir=data, on_progress=cp.silent)
    assert both.description["sources"] == {"gsm8k": 6, "own": 3}
    assert both.description["own_text"]["pieces"] == 3


def test_wikitext_is_measured_where_it_is_at_hand(data: Path, tmp_path: Path) -> None:
    own = shutil.copytree(data, tmp_path / "data")
    assert with_general_text(recipe(data), tmp_path / "run", own).on[1:] == OWN, "that is no 40,000 tokens"
    (own / "wikitext2" / "wiki.test.raw").write_text("some words\n" * 4000, encoding="utf-8")
    wanted = with_general_text(recipe(data), tmp_path / "run", own)
    assert wanted.on[1:] == (*OWN, "wikitext2_ppl:40000")
    assert with_general_text(recipe(data), tmp_path / "run", None).on[1:] == OWN, "nothing is fetched"
    with Ledger(tmp_path / "run" / "results.ledger", {}) as book:
        book.append("general_text", list(wanted.on[2:]))
    for where, found in ((own, wanted.on[2:]), (data, wanted.on[2:3])):
        assert with_general_text(recipe(data), tmp_path / "run", where).on[1:] == found, "as it was begun"


def test_a_run_that_an_earlier_release_has_begun_goes_on_without(data: Path, tmp_path: Path) -> None:
    with Ledger(tmp_path / "results.ledger", {}) as book:
        book.append("versions", {})
    assert with_general_text(recipe(data), tmp_path, None).on[1:] == OWN, "nothing is measured yet"
    with Ledger(tmp_path / "results.ledger", {}) as book:
        book.append("dense/gsm8k_nll:4", [])
    assert with_general_text(recipe(data), tmp_path, None).on == ("gsm8k_nll:4",)


def test_a_model_that_cannot_write_is_measured_on_the_rest(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: Any) -> None:
        raise DataError("it cannot write")

    monkeypatch.setattr(pieces, "write", silent)
    with pytest.warns(UserWarning, match="general text is not measured: it cannot write") as said:
        running.run(recipe(model), tmp_path / "run", data_dir=data)
    assert len(said) == 1, "once, not for each task or model"
    assert tasks(tmp_path / "run") == [["gsm8k_nll"]] * 2
    with pytest.raises(DataError, match="it cannot write"):
        running.run(recipe(model, on=OWN), tmp_path / "named", data_dir=data)


@pytest.mark.thorough
def test_the_model_of_a_run_is_intact_whatever_it_was_made_from(data: Path, tmp_path: Path) -> None:
    """Models that are read again from their checkpoint are measured on the text of the run's model too."""
    base = embedded.load(str(write_model(tmp_path / "base")))
    base.projections[0].write(torch.zeros(base.projections[0].shape))
    save(base, tmp_path / "model", manifest={"method": {}})
    wanted = recipe(tmp_path / "model", save=True)
    calm = running.run(wanted, tmp_path / "calm", data_dir=data)
    stops = wanted, tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        own = cells.evaluate

        def evaluates(decoder: Any, task: list[str], *rest: Any, **options: Any) -> Any:
            if OWN[0] in task and (tmp_path / "run" / "checkpoints").exists():
                raise KeyboardInterrupt
            return own(decoder, task, *rest, **options)

        patch.setattr(cells, "evaluate", evaluates)
        with pytest.raises(KeyboardInterrupt):
            running.run(*stops, data_dir=data)
    again = running.run(*stops, data_dir=data)
    for one, other in zip(calm["rows"], again["rows"], strict=True):
        assert [r["values"] for r in one["results"]] == [r["values"] for r in other["results"]]
    assert again["rows"][1]["results"][2]["description"]["model"].endswith("magnitude-matrix-0.5")


def test_a_plan_counts_it(model: Path, data: Path, tmp_path: Path) -> None:
    found = {
        job.name: (job.count, job.tokens) for job in plan(recipe(model), tmp_path / "run", data_dir=data).jobs
    }
    assert found[" and ".join(OWN)] == (2, 192), "one pass for both"
    assert found["text of its own, written once"] == (1, 8 * 96)
    own = CalibrationSpec(("gsm8k:4", "own:2"), subsets=3, max_tokens=100)
    jobs = plan(recipe(model, calibration=own, methods=("wanda",)), tmp_path / "run", data_dir=data).jobs
    found = {job.name: job.tokens for job in jobs}
    assert found["pruning on calibration data"] > 200
    assert found["text of its own, written once"] == 8 * (96 + 200)
    written = set()
    for preserve in (("own",), ("c4:9", "own")):  # a share of the task's tokens, whatever else is preserved
        own = CalibrationSpec(("gsm8k:4",), max_tokens=100, preserve=preserve)
        jobs = plan(recipe(model, calibration=own), tmp_path / "run", data_dir=data).jobs
        written |= {job.tokens for job in jobs if job.name == "text of its own, written once"}
    assert written == {8 * (96 + 100)}


@pytest.mark.parametrize(("added", "best"), [(True, 0.5), (False, None)])
def test_a_sweep_decides_by_what_was_named(
    added: bool, best: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def result(task: str, loss: float, **own: bool) -> dict[str, Any]:
        values = (loss, loss + 0.2), (1.0, 1.0), ("a", "b")
        return dataclasses.asdict(EvalResult(task, "nats_per_token", *values, description=own))

    def run(wanted: Recipe, *_: Any, **__: Any) -> dict[str, Any]:
        losses = {"dense": 1.0, **{f"magnitude-matrix-{s:g}": 1 + s for s in wanted.sparsities}}
        rows = {k: [result("gsm8k_nll", 1.0), result("own_kl", v, added=added)] for k, v in losses.items()}
        sparsity = {label: losses[label] - 1 for label in rows}
        return {"rows": [{"label": k, "sparsity": sparsity[k], "results": v} for k, v in rows.items()]}

    monkeypatch.setattr(sweeping, "run", run)
    tried = sweeping.sweep(recipe(tmp_path, sparsities=(0.3, 0.5)), 0.9, tmp_path)
    assert max((one.sparsity for one in tried if one.holds), default=None) == best
    assert tried[-1].differences[1][1].difference > 0, "it is shown in any case"
    assert ("decides nothing" in tried[-1].differences[1][0]) == added


def test_text_of_its_own_calibrates(data: Path) -> None:
    decoder = tiny_decoder()
    found = calibrated(decoder, CalibrationSpec(("gsm8k:4", "own:2"), subsets=2, max_tokens=400), data)
    assert found.description["sources"] == {"gsm8k": 4, "own": 2}
    own = [example for example in found.examples if example.source == "own"]
    assert own == written.own_pieces(decoder, 2, 400, 0)
    assert found.description["tokens"] == sum(len(example.tokens) for example in found.examples)
