"""A run keeps the checkpoint that nothing beats, and deletes nothing that is not its own."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from reporting import write_run
from test_run import stops_at
from tinydata import tiny_decoder

from causalprune.checkpoints.saving import MANIFEST, read_manifest, save
from causalprune.checkpoints.verification import verify
from causalprune.core.errors import OptionError
from causalprune.evaluation.results import headline, load_rows
from causalprune.reports.judging import Verdict
from causalprune.reports.summary import verdict
from causalprune.reports.writing import report
from causalprune.runs import cells, endings
from causalprune.runs import study as running
from causalprune.runs.keeping import keep_for_now, let_go
from causalprune.runs.plans import plan
from causalprune.runs.recipe import CalibrationSpec, ModelSpec, Recipe
from causalprune.runs.rows import parse_removal
from causalprune.runs.timing import speeds


def recipe(model: Path, *methods: str, **changes: Any) -> Recipe:
    calibration, on = CalibrationSpec(("gsm8k",), n=6, subsets=3), ("gsm8k_nll:4", "strategyqa_nll")
    return Recipe(ModelSpec(str(model)), calibration, methods, (0.5,), on, general_text="none", **changes)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.thorough
def test_only_the_recommended_checkpoint_stays(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for methods in (("random",), ("random", "magnitude"), ("random", "magnitude", "wanda", "sparsegpt")):
        record = running.run(recipe(model, *methods), folder, data_dir=data)
        assert kept(folder) == [verdict(record).label]
    (best,) = kept(folder)
    assert verify(folder / "checkpoints" / best).ok
    assert "## Results" in (folder / "checkpoints" / best / "README.md").read_text()
    everything = running.run(recipe(model, "random", "wanda", save=True), tmp_path / "all", data_dir=data)
    assert kept(tmp_path / "all") == [row["label"] for row in everything["rows"][1:]]
    running.run(recipe(model, "random", "wanda"), tmp_path / "all", data_dir=data)
    assert len(kept(tmp_path / "all")) == 2, "what `save` kept is the user's"


@pytest.mark.thorough
def test_the_methods_that_a_recipe_saves_are_kept_beside_the_best(
    model: Path, data: Path, tmp_path: Path
) -> None:
    wanted = recipe(model, "random", "magnitude", "shrink:0.1", save=("random", "shrink:0.1"))
    record = running.run(wanted, tmp_path / "run", data_dir=data)
    random, small = (row["label"] for row in record["rows"] if row["criterion"] in ("random", "shrink"))
    assert kept(tmp_path / "run") == sorted({random, small, verdict(record).label or random})


def test_what_is_to_be_saved_of_a_finished_run_is_made_again_and_stays(
    model: Path, data: Path, tmp_path: Path
) -> None:
    folder, methods = tmp_path / "run", ("random", "magnitude")
    before = running.run(recipe(model, *methods, save=()), folder, data_dir=data)
    (best,) = kept(folder)
    after = running.run(recipe(model, "wanda", *methods, save=methods), folder, data_dir=data)
    labels = {row["label"] for row in before["rows"][1:]}
    assert labels <= set(kept(folder))
    assert [after["rows"][0], *after["rows"][2:]] == before["rows"]
    let_go(folder / "checkpoints" / best)
    assert labels <= set(kept(folder))
    assert all(verify(folder / "checkpoints" / name).ok for name in kept(folder))


@pytest.mark.parametrize("touch", ["added", "changed", "asked for", "link"])
def test_what_somebody_touched_stays(touch: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "wanda-row-0.5"
    if touch == "asked for":
        save(tiny_decoder(), folder, manifest={})
    else:
        keep_for_now(tiny_decoder(), folder, {})
    if touch == "added":
        (folder / "notes.txt").write_text("mine")
    elif touch == "changed":
        (folder / "config.json").write_text((folder / "config.json").read_text())
    elif touch == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    let_go(folder)
    with pytest.warns(UserWarning, match="is not kept"):
        keep_for_now(tiny_decoder(), folder, {"other": True})
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_untouched_one_goes_whole(tmp_path: Path) -> None:
    folder = tmp_path / "wanda-row-0.5"
    keep_for_now(tiny_decoder(), folder, {})
    (folder / "README.md").write_text("results, written later")
    keep_for_now(tiny_decoder(), folder, {"again": True})
    assert read_manifest(folder)["run"]["again"]
    let_go(folder)
    let_go(folder)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_stop_a_run(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causalprune.checkpoints.saving.write_model", full)
    with pytest.warns(UserWarning, match="No space left"):
        record = running.run(recipe(model, "wanda"), tmp_path / "run", data_dir=data)
    assert len(record["rows"]) == 2
    found = endings.outcome_of(record, tmp_path / "run", "wanda-row-0.5", "then")
    assert found is not None
    assert found.checkpoint is None


@pytest.mark.thorough
def test_smaller_models_stand_beside_sparse_ones(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = tmp_path / "run", recipe(model, "wanda", "shrink:0.1", save=True)
    with monkeypatch.context() as patch:
        patch.setattr(cells, "evaluate", stops_at(5, []))
        with pytest.raises(KeyboardInterrupt):
            running.run(wanted, folder, data_dir=data)
    with monkeypatch.context() as patch:
        patch.setattr(cells, "shrink", None)  # it may not be called
        record = running.run(wanted, folder, data_dir=data)
    dense, wanda, small = record["rows"]
    assert [row["label"] for row in record["rows"]] == ["dense", "wanda-row-0.5", "shrink-0.1"]
    assert (wanda["parameters"], wanda["bytes"]) == (dense["parameters"], dense["bytes"])
    assert small["removed"] == 0.1
    assert small["parameters"] == pytest.approx(0.9 * dense["parameters"], rel=0.01)
    assert small["bytes"] == 4 * small["parameters"]
    assert small["speed"]["rounds"] >= 3
    assert not list(folder.glob("*.pruning*"))
    checkpoint = folder / "checkpoints" / "shrink-0.1"
    about = read_manifest(checkpoint)["run"]["shrink"]
    assert about["size"]["after"] == {"parameters": small["parameters"], "bytes": small["bytes"]}
    card = (checkpoint / "README.md").read_text()
    assert "times the dense model's" in card
    assert "## Results" in card
    rows = dict(load_rows(folder))
    assert headline(rows["shrink-0.1"][0]) != headline(rows["dense"][0])
    page, numbers = tmp_path / "report.html", tmp_path / "all.csv"
    report([folder], page, csv=numbers)
    text = page.read_text(encoding="utf-8")
    for word in (
        "10 % fewer parameters",
        f"{small['parameters']:,} parameters",
        "times as fast",
        "size and speed",
    ):
        assert word in text
    assert f",0.1,{small['parameters']}," in numbers.read_text()


def test_sizes_stand_in_the_tables(run: Run, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", methods=("wanda-row", "shrink"), sparsities=(0.2,))
    code, out, err = run("compare", folder, "--markdown")
    assert code == 0, err
    assert "| shrink-0.2 <br> 0 MB, writing 1.25× |" in out
    assert "| wanda-row-0.2 <br> 0 MB, speed 1× |" in out


def test_names_of_smaller_models() -> None:
    assert parse_removal("shrink").share == 0.2
    assert parse_removal("shrink:0.1").how.update == "distill"
    assert parse_removal("shrink:0.1+refit", seed=3).how.update == "refit"
    assert parse_removal("shrink:0.1", seed=3).how.seed == 3
    cells = Recipe(
        ModelSpec("x"),
        CalibrationSpec(("gsm8k",)),
        ("wanda", "shrink", "shrink:0.1+refit"),
        (0.2, 0.5),
        ("t",),
    ).cells()
    assert list(cells) == ["dense", "wanda-row-0.2", "wanda-row-0.5", "shrink-0.2", "shrink+refit-0.1"]
    smaller = Recipe(ModelSpec("x"), CalibrationSpec(("gsm8k",)), ("shrink:0.2+refit",), (0.5,), ("t",))
    assert smaller.calibration.preserve == ("own",)
    for text, words in (
        ("shrink:row", "as in shrink:0.2"),
        ("shrink:2", "between 0 and 1"),
        ("shrink:0.2+hope", "refit"),
    ):
        with pytest.raises(OptionError, match=words):
            parse_removal(text)


def test_a_share_that_cannot_go_is_refused_before_anything_is_measured(
    model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="cannot be so small"):
        running.run(recipe(model, "wanda", "shrink:0.9"), tmp_path / "run", data_dir=data)
    assert not (tmp_path / "run").exists()


def test_a_plan_counts_two_checkpoints_or_all(model: Path, data: Path, tmp_path: Path) -> None:
    methods = ("wanda", "magnitude", "shrink:0.1")
    some, all_of_them = (
        plan(recipe(model, *methods, save=save), tmp_path / "run", data_dir=data) for save in (False, True)
    )
    assert some.disk_bytes * 3 == pytest.approx(all_of_them.disk_bytes * 2)
    assert [job.name for job in some.jobs][:2] == ["pruning on calibration data", "making smaller models"]
    assert some.jobs[1].count == 1


@pytest.mark.thorough
def test_both_models_are_timed_in_turns() -> None:
    whole = tiny_decoder()
    state = {name: value.clone() for name, value in whole.model.state_dict().items()}
    found = speeds(whole, whole)
    assert found is not None
    assert found.rounds == 5
    assert min(found.reading, found.writing, found.dense_reading, found.reading_gain) > 0
    assert "5 rounds" in found.how
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    assert speeds(whole, whole, seconds=0.0) is None


def test_the_next_command_names_what_lacks(model: Path, data: Path, tmp_path: Path) -> None:
    own = recipe(model, "wanda")
    record = running.run(own, tmp_path / "run", data_dir=data)
    best = tmp_path / "run" / "checkpoints" / "wanda-row-0.5"

    def then(holds: bool) -> str:
        judged = Verdict("wanda-row-0.5", holds, "", measure="gsm8k_answers:4")
        return endings.next_command(record, tmp_path / "run", judged, data).removeprefix("causalprune ")

    there = f"--data-dir {data}"
    assert then(holds=False) == f"evaluate {best} --on gsm8k_answers:4 -o {best}.json {there}"
    smaller = tmp_path / "run" / "smaller"
    assert then(holds=True) == f"shrink {model} -o {smaller} --parameters 0.2 -t gsm8k:6 {there}"
    (best / MANIFEST).unlink()
    on = "--on gsm8k_nll:4 --on strategyqa_nll"
    assert then(holds=False) == f"sweep {model} -o {tmp_path / 'run' / 'sweep'} {on} -t gsm8k:6 {there}"


def test_the_next_command_says_all_that_the_run_was_told(tmp_path: Path) -> None:
    spec, own = (
        ModelSpec("m", device="cpu", device_map="auto"),
        CalibrationSpec(("./train",), preserve=("none",)),
    )
    answers: dict[str, Any] = {"answer": "letter", "max_new_tokens": 9, "scorers": ("short=mine:short",)}
    wanted = Recipe(spec, own, ("causal",), (0.5,), ("./test_short",), **answers)
    rows = [{"label": "dense", "results": [{"task": "./test_short", "description": {"limit": 4}}]}]
    record = {"recipe": asdict(wanted), "calibration": {"sources": {"./train": 6}}, "rows": rows}

    def then(*, holds: bool) -> str:
        return endings.next_command(record, tmp_path, Verdict("causal-row-0.5", holds, ""))

    of_model = "-t ./train:6 --preserve none --device cpu --device-map auto"
    on = "--on ./test_short:4 --scorer short=mine:short --answer letter --max-new-tokens 9"
    assert then(holds=False) == f"causalprune sweep m -o {tmp_path}/sweep {on} {of_model}"
    assert then(holds=True) == f"causalprune shrink m -o {tmp_path}/smaller --parameters 0.2 {of_model}"
    kept = tmp_path / "checkpoints" / "causal-row-0.5"
    save(tiny_decoder(), kept, manifest={})
    judged = Verdict(kept.name, holds=False, headline="", measure="./test_answers:4")
    words = endings.next_command(record, tmp_path, judged)
    assert words.endswith(f"--on ./test_answers:4 -o {kept}.json --answer letter --max-new-tokens 9")


def test_what_reads_the_same_data_is_said() -> None:
    wanted, model = (
        CalibrationSpec(("gsm8k",), seed=3, chat="off", fold_system=True),
        ModelSpec("m", date="2026-05-01"),
    )
    words = "--data-dir d --seed 3 --chat off --fold-system --date 2026-05-01"
    assert endings.reading(vars(wanted), vars(model), "d") == words.split()
    assert (
        endings.reading(vars(CalibrationSpec(("gsm8k",))), vars(ModelSpec("m", dtype="float32")), None) == []
    )


def test_the_other_part_of_a_users_data_is_measured_where_it_is_found(tmp_path: Path) -> None:
    own = {"calibration": {"sources": {str(tmp_path / "train.jsonl"): 4}}}
    save(tiny_decoder(), tmp_path / "out", manifest=own)
    assert " TEST.jsonl_nll " in endings.outcome(tmp_path / "out").then
    (tmp_path / "test.jsonl").write_text("")
    assert f" {tmp_path}/test.jsonl_nll " in endings.outcome(tmp_path / "out").then


def test_the_other_folder_of_a_users_data_stays_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test").mkdir()
    for name in ("./train", "./train/"):
        save(tiny_decoder(), Path("out"), manifest={"calibration": {"sources": {name: 4}}}, overwrite=True)
        assert " --on ./test_nll " in endings.outcome(Path("out")).then
