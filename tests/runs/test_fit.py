"""The search for the file to ship, from end to end on a tiny model; a stopped one goes on."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import shipped
from conftest import Run, assert_refused
from tinydata import tiny_decoder, write_data

import causalprune as cp
from causalprune.core.errors import ModelError, OptionError
from causalprune.core.types import EvalResult
from causalprune.models.loading import load
from causalprune.runs import ModelSpec, searching
from causalprune.runs import shipped as fit_of
from causalprune.runs.single import Options
from causalprune.shipping.frontier import Limit, Point, front
from causalprune.shipping.recounting import looked_into

TYPES = ("--types", "q8_0,q4_0,q2_k", "--shares", "0.2", "--pre-tokenizer", "gpt-2")


@pytest.mark.slow
def test_a_file_within_the_limit_and_a_search_that_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shipped.write(
        tmp_path / "model", hidden_size=256, intermediate_size=512, max_position_embeddings=512
    )
    data, output, seen = write_data(tmp_path / "data", rows=40), tmp_path / "out", list[str]()
    words = ("-t", "gsm8k:4", "--on", "gsm8k_nll:6", "--size", "0.8MB", "--data-dir", data, *TYPES)
    evaluate = searching.evaluate

    def counting(*given: Any, **named: Any) -> Any:
        if len(seen) == 2 and "stopped" not in seen:
            seen.append("stopped")
            raise KeyboardInterrupt
        seen.append("measured")
        return evaluate(*given, **named)

    monkeypatch.setattr(searching, "evaluate", counting)
    assert run("fit", model, "-o", output, *words)[0] == 130
    code, out, err = run("fit", model, "-o", output, *words)
    assert code == 0, err
    record = json.loads((output / "frontier.json").read_text(encoding="utf-8"))
    measured = [p for p in record["points"] if p["measured_rise"] is not None]
    assert (
        seen.count("measured") == len(measured) + 2
    )  # the whole model and the smaller one as they are; none twice
    assert {p["name"] for p in measured} >= {"q8_0", "q4_0", "q2_k"}
    file = output / "model.gguf"
    assert file.stat().st_size == record["file"]["bytes"] <= 0.8e6
    assert abs(record["chosen"]["bytes"] - record["file"]["bytes"]) < 1000
    assert looked_into(file)["architecture"] == "llama"
    assert len(record["asked"]) == 4
    assert (output / "frontier.html").exists()
    assert str(file) in out
    assert (record["chosen"]["share"] > 0) == (output / "model" / "config.json").exists()
    assert looked_into(file)["name"].startswith("model")
    assert {p.name for p in front(points_of(record), rises_of(record))} == record["speeds"].keys()
    assert "Speed against the task" in (output / "frontier.html").read_text(encoding="utf-8")
    assert not (output / "work" / "model.gguf").exists()
    timed, speed = [*record["speeds"]], fit_of._speed
    monkeypatch.setattr(fit_of, "_speed", lambda *given: timed.append(given[1].name) or speed(*given))
    slow = words[:4] + words[6:]
    for wanted in ("0.01x", "0.02x"):
        code, out, err = run("fit", model, "-o", output, *slow, "--speed", wanted, "--json")
        assert code == 0, err
        assert json.loads(out)["speeds"]
    assert len(timed) == len(set(timed)), "no file is timed twice, whatever the limit"
    code, _, err = run("fit", model, "-o", output, *slow, "--speed", "1000x")
    assert code == 2
    assert "× the speed" in err


def points_of(record: dict[str, Any]) -> list[Point]:
    """Return the points of a record."""
    return [Point(p["share"], p["mix"], p["bytes"]) for p in record["points"]]


def rises_of(record: dict[str, Any]) -> dict[str, float]:
    """Return what was measured of the points of a record."""
    return {p["name"]: p["measured_rise"] for p in record["points"] if p["measured_rise"] is not None}


@pytest.mark.slow
def test_smaller_models_come_from_a_checkpoint_that_is_one(run: Run, tmp_path: Path) -> None:
    model = shipped.write(
        tmp_path / "model", hidden_size=256, intermediate_size=512, max_position_embeddings=512
    )
    data, output, first = write_data(tmp_path / "data", rows=40), tmp_path / "out", tmp_path / "first"
    words = ("-t", "gsm8k:4", "--preserve", "none", "--data-dir", data)
    assert run("prune", model, "-o", tmp_path / "zeros", "--method", "magnitude", "--sparsity", "0.5")[0] == 0
    code, _, err = run(
        "shrink", tmp_path / "zeros", "-o", first, "--neurons", "0.25", "--update", "refit", *words
    )
    assert code == 0, err
    words += ("--on", "gsm8k_nll:6", "--keep", "0.01", "--update", "refit", *TYPES, "--from", first)
    code, _, err = run("fit", model, "-o", output, *words)
    assert code == 0, err
    record = json.loads((output / "frontier.json").read_text(encoding="utf-8"))
    shares = sorted({p["share"] for p in record["points"]})
    assert record["from"] == str(first)
    assert len(shares) == 3
    assert shares[2] == pytest.approx(1 - (1 - shares[1]) * 0.8, abs=1e-3)
    made = load(str(output / "work" / f"without-{shares[2]:g}"), device="cpu").projections
    assert all(float((p.read() == 0).double().mean()) > 0.4 for p in made)
    larger = run("fit", first, "-o", tmp_path / "other", *words[:-1], tmp_path / "zeros")
    assert_refused(larger, "is no pruned or smaller", tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "gsm8k_nll:6"), "name one limit"),
        (("--on", "gsm8k_nll:6", "--size", "1MB", "--keep", "0.9"), "name one limit"),
        (("--on", "gsm8k_nll:6", "--size", "1MiB"), "400MB"),
        (("--on", "gsm8k_nll:6", "--size", "1MB", "--types", "q4_km"), "did you mean 'q4_k_m'"),
        (("--on", "gsm8k_nll:6", "--size", "1MB", "--shares", "half"), "0.1,0.2"),
        (("--on", "gsm8k_loss:6", "--size", "1MB"), "gsm8k_loss"),
        (("--on", "own_kl:512", "--size", "1MB"), "own_kl needs the intact embedding"),
    ],
)
def test_mistakes_are_said_before_any_work(
    run: Run, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    assert_refused(run("fit", "embedded", "-o", tmp_path / "out", *words), said, tmp_path / "out")


def test_a_file_that_is_not_its_own_is_not_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"mine")
    code, _, err = run("fit", "embedded", "-o", tmp_path, "--on", "gsm8k_nll:6", "--size", "1MB")
    assert code == 2
    assert "was not written by `fit`" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    (tmp_path / "frontier.json").write_text("{}")  # of a search whose ledger was deleted to start again
    code, _, err = run("fit", tmp_path / "none", "-o", tmp_path, "--on", "gsm8k_nll:6", "--size", "1MB")
    assert code
    assert "was not written by `fit`" not in err


@pytest.mark.thorough
def test_a_gguf_file_is_fitted_and_what_is_there_stays(run: Run, tmp_path: Path) -> None:
    model, file, output = (
        shipped.write(tmp_path / "model", "qwen2"),
        tmp_path / "whole.gguf",
        tmp_path / "out",
    )
    cut = ("--pre-tokenizer", "qwen2")
    assert run("export", model, "-o", file, "--gguf", "f32", *cut)[0] == 0
    data = write_data(tmp_path / "data", rows=40)
    words = ("-o", output, "--on", "gsm8k_nll:6", "--data-dir", data, "--shares", "", *cut)
    words = (*words, "--preserve", "none", "-t")
    assert_refused(
        run("fit", file, *words, "gsm8k:4", "--types", "q8_0", "--size", "1KB"),
        "outside of its layers",
        output,
    )
    code, _, err = run("fit", file, *words, "gsm8k:4", "--types", "q8_0", "--size", "1MB")
    assert code == 0, err
    made = (output / "model.gguf").read_bytes()
    code, _, err = run("fit", file, *words, "gsm8k:4", "--types", "q8_0,q4_0", "--size", "1MB")
    assert code == 0, err
    points = json.loads((output / "frontier.json").read_text(encoding="utf-8"))["points"]
    assert {p["name"] for p in points if p["measured_rise"] is not None} == {"q8_0", "q4_0"}
    code, _, err = run(
        "fit", file, *words, "gsm8k:4", "--types", "q8_0", "--size", f"{len(made) / 1e3 - 10:.0f}KB"
    )
    assert code == 2
    assert "MB" in err
    assert (output / "model.gguf").read_bytes() == made
    other = ("fit", file, *words, "gsm8k:5", "--types", "q8_0", "--size", "1MB")
    assert "belongs to another run" in run(*other)[2]


def test_shares_that_a_model_cannot_lose_are_left_out_and_said(tmp_path: Path) -> None:
    spec = ModelSpec(str(shipped.write(tmp_path / "model")))  # a third of it are embeddings
    with pytest.warns(UserWarning, match=r"no file without 90% of the parameters is tried: .* so small"):
        assert searching.possible(spec, (0.1, 0.2, 0.9)) == (0.1, 0.2)


def test_a_single_problem_with_several_answers_has_no_halves() -> None:
    result = EvalResult("x_nll", "nats_per_token", (1.0, 2.0), (1.0, 1.0), ("a", "a"))
    with pytest.raises(OptionError, match="x_nll has one problem"):
        searching.check_halves(result, Limit("size", 1.0))


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("llama", {"neurons", "kv_groups", "experts", "layers"}),
        ("gemma3_text", {"neurons", "kv_groups", "experts"}),
        ("cohere2", {"neurons", "experts"}),
    ],
)
def test_only_units_go_without_which_llama_cpp_may_run(architecture: str, kinds: set[str]) -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type=architecture))
    decoder: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    assert {*searching.budget_of(decoder, 0.2).kinds} == kinds


def pretended(**own: Any) -> Any:
    """Return a search that has measured a whole file and a smaller one."""
    asked = SimpleNamespace(limit=Limit("size", 100), on="gsm8k_nll")
    rises = {"q8_0": 0.1, "0.1-q8_0": 0.05}
    given = {"asked": asked, "output": Path("out"), "work": Path("work"), "rises": lambda _: rises}
    return SimpleNamespace(**given, book=SimpleNamespace(rows={}), keeps=lambda _: {}, **own)


def test_a_smaller_model_that_cannot_be_a_file_is_said_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shrunk(share: float) -> None:
        if share == 0.1:
            raise ModelError("no such file")

    points = {0.0: [Point(0.0, "q8_0", 90)], 0.2: [Point(0.2, "q8_0", 70)]}
    for name in ("check_reach", "settle", "check_halves"):
        monkeypatch.setattr(fit_of, name, lambda *_: None)
    monkeypatch.setattr(fit_of, "enough", lambda *_: False)
    monkeypatch.setattr(fit_of, "too_large", lambda *_: False)
    search = pretended(shares=(0.1, 0.2), shrunk=shrunk, measure=lambda *_: None, known=lambda _: True)
    search.points, search.result = points.__getitem__, lambda *_: None
    with pytest.warns(UserWarning, match="no file without 10% of the parameters is tried: no such file"):
        assert [p.name for p in fit_of._searched(search)] == ["q8_0", "0.2-q8_0"]


def test_what_units_are_worth_is_measured_once_for_all_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()

    def smaller(*_: Any, ledger: Path, **__: Any) -> Any:
        units = searching.leftovers(ledger)["units"]
        seen.append(units.read_text() if units.exists() else "nothing")
        units.write_text("effects")
        return SimpleNamespace(decoder=None)

    monkeypatch.setattr(searching, "shrink", smaller)
    monkeypatch.setattr(searching, "save", lambda *_, **__: None)
    monkeypatch.setattr(searching, "budget_of", lambda *_: None)
    spec = ModelSpec("model")
    search = pretended(start=searching.Start(spec), calibration=None, load=lambda _: None)
    search.asked.start, search.asked.update = None, "distill"
    search.work, search.folder = tmp_path, lambda share: tmp_path / f"without-{share:g}"
    search.options, search.wanted = Options(stage=cp.quiet), SimpleNamespace(seed=0)
    search.book.append = search.book.rows.__setitem__
    for share in (0.1, 0.2):
        searching.Search.shrunk(search, share)
    assert seen == ["nothing", "effects"]
    assert [path.name for path in tmp_path.iterdir()] == [searching.EFFECTS]
    searching.clear(tmp_path, whole=True)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_llama_cpp_refuses_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def exported(_: Any, point: Point, target: Path) -> Path:
        if point.share:
            raise ModelError("llama.cpp cannot load it")
        return target

    monkeypatch.setattr(fit_of, "_export", exported)
    points = [Point(0.0, "q8_0", 90), Point(0.1, "q8_0", 80)]
    with pytest.warns(UserWarning, match="0.1-q8_0 is no file: llama.cpp cannot load it"):
        point, _ = fit_of._best(pretended(), points, Path("made.gguf"), {})
    assert point.name == "q8_0"
    assert points == [point]


def test_the_whole_model_is_the_intact_one_whatever_it_was_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its own text would be another model's."""
    made = dataclasses.replace(tiny_decoder(), base={"name": "other", "fingerprint": "other"})
    monkeypatch.setattr(searching, "load", lambda _: made)
    spec, own = ModelSpec("model"), SimpleNamespace(start=None)
    missing: Any = None
    search = searching.Search(
        spec,
        missing,
        Path("out"),
        own,
        missing,
        missing,
        searching.Start(spec),
        "whole",  # type: ignore[arg-type]
    )
    assert search.load(0.0).base is None
    assert search.load(0.1).base == {"name": "model", "fingerprint": "whole"}


def test_a_share_is_kept_of_a_likelihood_or_of_scores_from_zero_up() -> None:
    def result(metric: str, *values: float, **description: Any) -> EvalResult:
        names = tuple(map(str, range(len(values))))
        return EvalResult("x", metric, values, (1.0,) * len(values), names, description=description)

    limit = Limit("keep", 0.9)
    searching.check_halves(result("nats_per_token", 1.0, 2.0), limit)
    searching.check_halves(result("length", 1.0, 2.0, higher_is_better=True), limit)
    for own in (
        result("length", -1.0, 2.0, higher_is_better=True),
        result("length", 1.0, 2.0, higher_is_better=False),
    ):
        searching.check_halves(own, Limit("size", 1.0))
        with pytest.raises(OptionError, match=r"from 0 up, and x \(length\) is neither"):
            searching.check_halves(own, limit)
    with pytest.raises(OptionError, match="solves none"):
        searching.check_halves(result("accuracy", 0.0, 1.0), limit)


def test_a_file_that_is_known_to_be_too_slow_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(fit_of, "_export", lambda _, point, target: made.append(point.name) or target)
    monkeypatch.setattr(fit_of, "_speed", lambda *_: {"over_dense": 2.0})
    search, speeds = pretended(), dict[str, Any]()
    search.asked.limit, search.book = Limit("speed", 1.5), Book({"speed/0.1-q8_0": {"over_dense": 1.0}})
    points = [Point(0.0, "q8_0", 90), Point(0.1, "q8_0", 80)]
    assert fit_of._best(search, points, Path("made.gguf"), speeds) == (points[0], Path("made.gguf"))
    assert made == ["q8_0"]
    assert {name: own["over_dense"] for name, own in speeds.items()} == {"q8_0": 2.0, "0.1-q8_0": 1.0}


class Book:
    """A ledger in memory."""

    def __init__(self, rows: dict[str, Any]) -> None:
        self.rows, self.append = rows, rows.__setitem__
