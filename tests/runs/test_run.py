import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tinydata import write_jsonl

from causalprune.checkpoints.saving import read_manifest
from causalprune.checkpoints.verification import verify
from causalprune.core.errors import CheckpointError, DataError, MismatchError, OptionError
from causalprune.evaluation.measures import evaluate
from causalprune.evaluation.results import load_rows, paired_difference
from causalprune.evaluation.settings import Settings
from causalprune.pruning.layers import prune
from causalprune.pruning.methods import Method
from causalprune.reports.evidence import read_run
from causalprune.runs import cells, single
from causalprune.runs import study as running
from causalprune.runs.recipe import AttributionSpec, CalibrationSpec, ModelSpec, Recipe, Shape


def stops_at(number: int, calls: list[str]) -> Any:
    """Return what takes the place of `evaluate`: Ctrl-C at this call of it, of all that `calls` lists by their tasks."""

    def evaluates(decoder: Any, tasks: list[str], *rest: Any, **options: Any) -> Any:
        calls.append(tasks[0])
        if len(calls) == number:
            raise KeyboardInterrupt
        return evaluate(decoder, tasks, *rest, **options)

    return evaluates


def recipe(model: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": ModelSpec(str(model)),
        "calibration": CalibrationSpec(("gsm8k",), n=6, subsets=3),
        "methods": ("magnitude", "wanda", "cap"),
        "sparsities": (0.5,),
        "on": ("gsm8k_nll:4", "strategyqa_nll"),
        "general_text": "none",
    }
    return Recipe(**{**values, **changes})


def test_run_measures_dense_and_every_method(model: Path, data: Path, tmp_path: Path) -> None:
    record = running.run(recipe(model, save=True), tmp_path / "run", data_dir=data)
    rows = dict(load_rows(tmp_path / "run"))
    assert list(rows) == ["dense", "magnitude-matrix-0.5", "wanda-row-0.5", "cap-global-0.5"]
    assert all([r.task for r in results] == ["gsm8k_nll", "strategyqa_nll"] for results in rows.values())
    for row in record["rows"][1:]:
        assert row["pruned"]["zeros"] == round(row["pruned"]["weights"] * 0.5)
    for dense, pruned in zip(rows["dense"], rows["cap-global-0.5"], strict=True):
        assert paired_difference(pruned, dense).n == len(dense.values)
        assert pruned.values != dense.values
    checkpoint = tmp_path / "run" / "checkpoints" / "cap-global-0.5"
    assert verify(checkpoint).ok
    reloaded = cells.load(ModelSpec(str(checkpoint)))
    again = evaluate(reloaded, ["gsm8k_nll:4"], data_dir=data, batch_tokens=2048)
    assert again[0].values == rows["cap-global-0.5"][0].values
    assert read_manifest(checkpoint)["run"]["calibration"]["sources"] == {"gsm8k": 6}


def test_in_a_wider_dtype_than_the_files_what_is_saved_is_measured(
    model: Path, data: Path, tmp_path: Path
) -> None:
    narrow = cells.load(ModelSpec(str(model), dtype="bfloat16"))
    narrow.model.save_pretrained(tmp_path / "narrow")
    narrow.tokenizer.save_pretrained(tmp_path / "narrow")
    spec = ModelSpec(str(tmp_path / "narrow"), dtype="float32")
    wanted = recipe(model, methods=("sparsegpt", "shrink:0.1+refit"), save=True, on=("gsm8k_nll:4",))
    own = replace(wanted.calibration, preserve=())
    wanted = replace(wanted, model=spec, calibration=own)
    for row in running.run(wanted, tmp_path / "run", data_dir=data)["rows"][1:]:
        saved = tmp_path / "run" / "checkpoints" / row["label"]
        decoder = cells.load(ModelSpec(str(saved), dtype="float32"))
        (again,) = evaluate(decoder, ["gsm8k_nll:4"], data_dir=data)
        assert tuple(row["results"][0]["values"]) == again.values
        assert row["results"][0]["description"]["fingerprint"] == decoder.fingerprint


@pytest.mark.thorough
def test_results_name_the_model_that_was_measured(model: Path, data: Path, tmp_path: Path) -> None:
    record = running.run(
        recipe(model, methods=("wanda", "shrink:0.1"), save=True), tmp_path / "run", data_dir=data
    )
    found = {
        row["label"]: {r["description"]["fingerprint"] for r in row["results"]} for row in record["rows"]
    }
    places = {name: tmp_path / "run" / "checkpoints" / name for name in found} | {"dense": model}
    assert found == {name: {cells.load(ModelSpec(str(place))).fingerprint} for name, place in places.items()}
    assert len(found) == 3
    for name in found.keys() - {"dense"}:
        assert {read_manifest(places[name])["base"]["fingerprint"]} == found["dense"]


@pytest.mark.thorough
def test_a_run_records_what_a_report_shows(model: Path, data: Path, tmp_path: Path) -> None:
    wanted = recipe(model, methods=("cap", "wanda+graded"), on=("gsm8k_nll:4", "strategyqa"))
    record = running.run(wanted, tmp_path / "run", data_dir=data, command="as typed")
    dense, cap, graded = record["rows"]
    assert (record["command"], record["cells"]) == ("as typed", [row["label"] for row in record["rows"]])
    assert record["attribution"]["seconds"] > 0
    pruned = cap["pruned"]
    assert sum(row[3] for row in pruned["matrices"]) == pruned["zeros"]
    assert [len(layer) for layer in pruned["heads"]] == [4, 4]
    q_and_o = [row for row in pruned["matrices"] if row[1] in ("q", "o")]
    mean = sum(map(sum, pruned["heads"])) / 8
    assert mean == pytest.approx(sum(row[3] for row in q_and_o) / sum(row[2] for row in q_and_o))
    assert len(graded["pruned"]["dose_response"]["nats"]) == 4
    assert graded["pruned"]["tokens_forwarded"] > pruned["tokens_forwarded"] == 0
    for row in (dense, cap):
        for result in row["results"]:
            assert result["description"]["tokens_forwarded"] > 0
            assert result["description"]["peak_bytes"]["process"] > 2**20
            assert bool(result["prompts"]) == bool(result["golds"]) == (row is dense)
    assert dense["results"][0]["prompts"][0].startswith("Ann has 10")
    assert set(dense["results"][1]["texts"]) <= {"yes", "no"}
    again = running.run(wanted, tmp_path / "run", data_dir=data)
    assert again["attribution"] == record["attribution"]


@pytest.mark.thorough
def test_stopped_run_goes_on_with_the_same_results(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(model)
    calm = running.run(wanted, tmp_path / "calm", data_dir=data)
    calls: list[str] = []
    monkeypatch.setattr(cells, "evaluate", stops_at(5, calls))
    with pytest.raises(KeyboardInterrupt):
        running.run(wanted, tmp_path / "stopped", data_dir=data)
    assert [label for label, _ in load_rows(tmp_path / "stopped")] == ["dense", "magnitude-matrix-0.5"]
    resumed = running.run(wanted, tmp_path / "stopped", data_dir=data)
    assert len(calls) == 8 + 1
    assert values(resumed) == values(calm)


@pytest.mark.thorough
def test_a_saved_checkpoint_is_measured_further_without_pruning_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(model, save=True, methods=("wanda",))
    calm = running.run(wanted, tmp_path / "calm", data_dir=data)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "evaluate", stops_at(4, []))
        with pytest.raises(KeyboardInterrupt):
            running.run(wanted, tmp_path / "stopped", data_dir=data)
    monkeypatch.setattr(cells, "prune", None)  # it may not be called
    resumed = running.run(wanted, tmp_path / "stopped", data_dir=data)
    assert values(resumed) == values(calm)
    description = resumed["rows"][1]["results"][1]["description"]
    assert description["model"] == str(tmp_path / "stopped" / "checkpoints" / "wanda-row-0.5")


def test_a_stopped_prune_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options = Method("causal", 0.5), single.Options(data)
    given = ModelSpec(str(model)), method, tmp_path / "out", CalibrationSpec(("gsm8k",), n=6)
    single.prune_checkpoint(*given[:2], tmp_path / "calm", given[3], None, options)

    with monkeypatch.context() as patch:
        patch.setattr("causalprune.pruning.layers.distill", lambda *_, **__: raised(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            single.prune_checkpoint(*given, None, options)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.pruning"]
    monkeypatch.setattr("causalprune.pruning.layers.output_slopes", None)  # it may not be called
    single.prune_checkpoint(*given, None, options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]
    calm, own = (load_file(tmp_path / name / "model.safetensors") for name in ("calm", "out"))
    assert all(torch.equal(weight, own[name]) for name, weight in calm.items())


@pytest.mark.parametrize(
    ("method", "last"), [("causal", "pruning.layers.distill"), ("shrink:0.1", "shrinking.removal.distill")]
)
def test_what_went_on_after_a_stop_has_no_time(
    method: str, last: str, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(model, methods=(method,), on=("gsm8k_nll:4",))
    with monkeypatch.context() as patch:
        patch.setattr(f"causalprune.{last}", lambda *_, **__: raised(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            running.run(wanted, tmp_path / "run", data_dir=data)
    assert running.run(wanted, tmp_path / "run", data_dir=data)["rows"][1]["pruned"]["seconds"] is None


@pytest.mark.thorough
def test_what_pruning_had_finished_stays_until_its_cell_is_measured(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(model, methods=("causal",))
    calm = running.run(wanted, tmp_path / "calm", data_dir=data)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "evaluate", stops_at(4, []))
        with pytest.raises(KeyboardInterrupt):
            running.run(wanted, tmp_path / "stopped", data_dir=data)
    assert list((tmp_path / "stopped").glob("*.pruning"))
    monkeypatch.setattr("causalprune.pruning.layers.output_slopes", None)  # it may not be called
    assert values(running.run(wanted, tmp_path / "stopped", data_dir=data)) == values(calm)
    assert not list((tmp_path / "stopped").glob("*.pruning"))


def raised(error: type[BaseException]) -> None:
    raise error


@pytest.mark.thorough
def test_one_model_is_in_memory_at_a_time(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[Any]] = []
    load = cells.load

    def counts(spec: ModelSpec) -> Any:
        gc.collect()
        assert not any(other() for other in seen)
        decoder = load(spec)
        seen.append(weakref.ref(decoder.model))
        return decoder

    monkeypatch.setattr(cells, "load", counts)
    running.run(recipe(model, methods=("magnitude", "wanda")), tmp_path / "run", data_dir=data)
    assert len(seen) == 3


@pytest.mark.thorough
def test_methods_may_be_added_to_a_finished_run(model: Path, data: Path, tmp_path: Path) -> None:
    first = running.run(recipe(model, methods=("magnitude",)), tmp_path / "run", data_dir=data)
    more = running.run(recipe(model, methods=("magnitude", "random")), tmp_path / "run", data_dir=data)
    assert values(more)[: len(values(first))] == values(first)
    assert more["rows"][-1]["label"] == "random-matrix-0.5"


def test_a_run_that_goes_on_with_other_versions_says_so(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe(model, methods=("magnitude",))
    running.run(small, tmp_path / "run", data_dir=data)
    newer = {**running.versions(), "torch": "99.0"}
    monkeypatch.setattr(running, "versions", lambda: newer)
    with pytest.warns(UserWarning, match=r"was begun with torch .* \(now 99\.0\): its rows may not compare"):
        running.run(small, tmp_path / "run", data_dir=data)


def test_another_calibration_in_the_same_folder_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    running.run(recipe(model, methods=("magnitude",)), tmp_path / "run", data_dir=data)
    other = recipe(model, calibration=CalibrationSpec(("gsm8k",), n=6, subsets=3, seed=1))
    with pytest.raises(MismatchError):
        running.run(other, tmp_path / "run", data_dir=data)


def test_shape_of_the_recipe_is_checked(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="2 layers of 4 heads"):
        running.run(recipe(model, shape=Shape(2, 5, 1e4)), tmp_path / "run", data_dir=data)


def test_one_file_for_both_ends_is_cut_in_two(model: Path, tmp_path: Path) -> None:
    problems = [{"prompt": f"Say {i}", "target": f"It is {i}."} for i in range(12)]
    own = str(write_jsonl(tmp_path / "own.jsonl", problems))
    wanted = recipe(
        model,
        calibration=CalibrationSpec((own,), n=6, subsets=3),
        on=(f"{own}_nll:5",),
        methods=("wanda",),
    )
    record = running.run(wanted, tmp_path / "run")
    assert record["calibration"]["skipped"]["excluded"] > 0
    greedy = recipe(model, calibration=CalibrationSpec((own,), n=8), on=(f"{own}_nll:5",))
    with pytest.raises(DataError, match="7"):
        running.run(greedy, tmp_path / "greedy")


def test_existing_output_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    method = Method("magnitude", 0.5)
    with pytest.raises(CheckpointError, match="exists"):
        single.prune_checkpoint(ModelSpec("no/such"), method, tmp_path / "out", CalibrationSpec(("gsm8k",)))


def test_cap_measures_first_where_no_effects_are_given(model: Path, data: Path, tmp_path: Path) -> None:
    method = Method("cap", 0.5)
    options = single.Options(data_dir=data)
    spec, wanted = ModelSpec(str(model)), CalibrationSpec(("gsm8k",), n=6)
    alone = single.prune_checkpoint(spec, method, tmp_path / "alone", wanted, options=options)
    single.attribute(spec, wanted, tmp_path / "effects", options)
    effects = tmp_path / "effects" / "effects.json"
    assert json.loads(effects.read_text()) == json.loads((tmp_path / "alone" / "effects.json").read_text())
    given = single.prune_checkpoint(spec, method, tmp_path / "given", wanted, effects, options)
    assert all(torch.equal(alone.keep[name], given.keep[name]) for name in given.keep)


def test_work_is_shared_out_in_one_way(model: Path, tmp_path: Path) -> None:
    options = single.Options(share=(1, 2), cluster=single.Cluster(2))
    with pytest.raises(OptionError, match=r"leave out --shard, or --executor ray"):
        single.attribute(ModelSpec(str(model)), CalibrationSpec(("gsm8k",), n=6), tmp_path / "out", options)


def values(record: dict[str, Any]) -> list[Any]:
    """Return all that a run measured, without its timings."""
    return [(row["label"], [result["values"] for result in row["results"]]) for row in record["rows"]]


@pytest.mark.thorough
def test_checkpoints_of_an_earlier_run_are_replaced(model: Path, data: Path, tmp_path: Path) -> None:
    """As after a refusal, whose advice is to delete the ledger."""
    folder, found = tmp_path / "run", []
    for seed in (0, 1):
        own = CalibrationSpec(("gsm8k",), n=6, subsets=3, seed=seed)
        wanted = recipe(model, methods=("wanda",), calibration=own, save=True)
        running.run(wanted, folder, data_dir=data)
        (folder / "results.ledger").unlink()
        found.append(read_manifest(folder / "checkpoints" / "wanda-row-0.5")["run"]["calibration"])
    assert found[0]["fingerprint"] != found[1]["fingerprint"]


@pytest.mark.thorough
def test_a_checkpoint_of_an_earlier_run_is_not_measured_for_this_one(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was saved by a run whose ledger is gone, when this one does not save."""
    folder, other = tmp_path / "run", CalibrationSpec(("gsm8k",), n=6, subsets=3, seed=1)
    running.run(recipe(model, methods=("wanda",), save=True), folder, data_dir=data)
    (folder / "results.ledger").unlink()
    wanted = recipe(model, methods=("wanda",), calibration=other)
    calm = running.run(wanted, tmp_path / "calm", data_dir=data)

    stays = "is not of this run"
    with monkeypatch.context() as patch:
        patch.setattr(cells, "evaluate", stops_at(4, []))
        with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match=stays):
            running.run(wanted, folder, data_dir=data)
    with pytest.warns(UserWarning, match=stays):
        found = running.run(wanted, folder, data_dir=data)
    assert values(found) == values(calm)


def test_another_attribution_in_the_same_folder_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    running.run(recipe(model, methods=("cap",)), tmp_path / "run", data_dir=data)
    (tmp_path / "run" / "attribution.ledger").unlink()
    other = recipe(model, methods=("cap",), attribution=AttributionSpec(ablation="mean"))
    with pytest.raises(MismatchError, match=r"attribution in .* was .*zero.* is now .*mean"):
        running.run(other, tmp_path / "run", data_dir=data)


@pytest.mark.thorough
def test_a_broken_model_does_not_stop_the_run(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(decoder: Any, method: Any, **options: Any) -> Any:
        pruned = prune(decoder, method, **options)
        decoder.projections[0].parameter.data.fill_(float("nan"))
        return pruned

    monkeypatch.setattr(cells, "prune", breaks)
    tasks = ("gsm8k_nll:4", "strategyqa", "gsm8k_cot:4")
    record = running.run(recipe(model, methods=("wanda",), on=tasks), tmp_path / "run", data_dir=data)
    for own in (record["rows"], read_run(tmp_path / "run").rows):
        for dense, broken in zip(own[0]["results"], own[1]["results"], strict=True):
            assert not any(map(math.isnan, dense["values"]))
            assert all(map(math.isnan, broken["values"]))
    assert values(running.run(recipe(model, methods=("wanda",), on=tasks), tmp_path / "run", data_dir=data))


def test_a_stopped_evaluation_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, spec, calls = tmp_path / "found.json", ModelSpec(str(model)), list[str]()
    settings = Settings(data_dir=data)

    monkeypatch.setattr(single, "evaluate", stops_at(2, calls))
    tasks = ("gsm8k_nll:4", "strategyqa_nll")
    with pytest.raises(KeyboardInterrupt):
        single.evaluate_model(spec, tasks, settings, out)
    assert not out.exists()
    found = single.evaluate_model(spec, tasks, settings, out)
    assert calls == ["gsm8k_nll:4", "strategyqa_nll", "strategyqa_nll"]
    assert [r.task for r in found] == ["gsm8k_nll", "strategyqa_nll"]
    assert {path.name for path in tmp_path.iterdir()} == {"found.json"}
