"""What `import causalprune as cp` gives: names, plain arguments, bars, and records that show themselves."""

import inspect
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from tinydata import tiny_decoder, write_data, write_jsonl

import causalprune as cp
from causalprune.checkpoints.saving import load_keep, read_manifest
from causalprune.core import waiting
from causalprune.core.errors import OptionError
from causalprune.core.types import Decoder

NEW = {
    "calibrate",
    "compare",
    "drawn",
    "quiet",
    "report",
    "run",
    "shrink",
    "silent",
    "sweep",
    "Shares",
    "Budget",
}
PARAMETERS = 10


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Show bars at once, and write what is cached apart."""
    monkeypatch.setattr(waiting, "DELAY_SECONDS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def recipe(model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "calibration": {"task": ["gsm8k"], "n": 4, "subsets": 2},
        "methods": ["magnitude"],
        "sparsities": [0.5],
        "on": ["gsm8k_nll:3"],
        "general_text": "none",
        **changes,
    }


def test_names_are_listed_and_resolve() -> None:
    assert set(dir(cp)) >= NEW | {"attribute", "prune", "evaluate", "load", "save", "Method"}
    assert all(getattr(cp, name).__doc__ for name in cp.__all__)


def test_listing_names_loads_nothing() -> None:
    code = "import causalprune as cp, sys; dir(cp); print('torch' in sys.modules, 'tqdm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_public_functions_take_few_parameters() -> None:
    functions = [getattr(cp, name) for name in cp.__all__ if inspect.isfunction(getattr(cp, name))]
    assert len(functions) > 14
    assert not [f.__name__ for f in functions if len(inspect.signature(f).parameters) > PARAMETERS]


def test_paths_are_text_too(tmp_path: Path) -> None:
    """Whoever works in a notebook writes strings."""
    functions = [getattr(cp, name) for name in cp.__all__ if inspect.isfunction(getattr(cp, name))]
    strict = [
        f"{f.__name__}({name})"
        for f in functions
        for name, own in inspect.signature(f).parameters.items()
        if "Path" in str(own.annotation) and "str" not in str(own.annotation)
    ]
    assert not strict
    data, folder = str(write_data(tmp_path / "data")), str(tmp_path)
    decoder = tiny_decoder(chat=True)
    calibration = cp.calibrate(decoder, ["gsm8k"], n=4, subsets=2, data_dir=data)
    effects = cp.attribute(decoder, calibration, ledger=f"{folder}/effects", on_progress=cp.silent)
    assert (tmp_path / "effects").exists()
    assert cp.evaluate(decoder, ["gsm8k_nll:2"], data_dir=data, on_progress=cp.silent)
    made = cp.shrink(
        decoder, 0.1, calibration, by="random", update="none", ledger=f"{folder}/small", stage=cp.quiet
    )
    assert made.decoder.layers
    method, decoder = cp.Method("cap", 0.5), tiny_decoder(chat=True)
    pruned = cp.prune(
        decoder,
        method,
        calibration=calibration,
        effects=effects,
        kept_in=f"{folder}/p",
        on_progress=cp.silent,
    )
    cp.save(decoder, f"{folder}/pruned", pruned)
    assert cp.verify(f"{folder}/pruned", against=f"{folder}/pruned").ok
    cp.run(recipe(tmp_path / "pruned"), f"{folder}/run", data_dir=data, stage=cp.quiet)
    files = cp.report(f"{folder}/run", json=f"{folder}/own.json", csv=f"{folder}/own.csv")
    assert all(file.is_file() for file in files)


def work(name: str, decoder: Decoder, data: Path) -> Any:
    calibration = cp.calibrate(decoder, ["gsm8k"], n=4, subsets=2, data_dir=data)
    return {
        "attribution": lambda **own: cp.attribute(decoder, calibration, **own),
        "pruning": lambda **own: cp.prune(decoder, cp.Method("wanda", 0.5), calibration=calibration, **own),
        "gsm8k_nll": lambda **own: cp.evaluate(decoder, ["gsm8k_nll:3"], data_dir=data, **own),
        "updating what stays": lambda **own: cp.shrink(decoder, 0.1, calibration, by="random", **own),
    }[name]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("label", ["attribution", "pruning", "gsm8k_nll", "updating what stays"])
def test_long_work_has_a_bar_that_can_be_turned_off(
    label: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = work(label, tiny_decoder(), data)
    capsys.readouterr()
    silence = {"stage": cp.quiet} if label.startswith("updating") else {"on_progress": cp.silent}
    call(**silence)
    assert not capsys.readouterr().err
    call()
    assert f"{label}: 100%" in capsys.readouterr().err


@pytest.mark.usefixtures("always")
def test_own_answers_have_a_bar(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = tiny_decoder()
    from causalprune.runs import traces

    monkeypatch.setattr(traces, "_answers", lambda *own: ["It is 7."] * len(own[-1]))
    found = cp.calibrate(decoder, ["own:gsm8k"], n=4, subsets=2, data_dir=data)
    assert "own answers: 100%" in capsys.readouterr().err
    assert found.description["sources"] == {"own:gsm8k": 4}


def test_a_tokenizer_will_do_where_nothing_is_written(data: Path) -> None:
    decoder = tiny_decoder()
    of_model, of_tokenizer = (
        cp.calibrate(own, ["gsm8k:3", "strategyqa"], n=5, data_dir=data)
        for own in (decoder, decoder.tokenizer)
    )
    assert of_model == of_tokenizer


@pytest.mark.usefixtures("always")
def test_the_command_line_has_no_second_bar(model: Path, data: Path, tmp_path: Path, run: Run) -> None:
    options = ("-n", 4, "--subsets", 2, "--data-dir", data, "--method", "wanda", "-t", "gsm8k")
    code, _, err = run("prune", model, "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "%|" not in err


@pytest.mark.thorough
@pytest.mark.usefixtures("always")
def test_a_run_takes_plain_things_and_shows_its_verdict(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = cp.run(recipe(model), str(tmp_path / "run"), data_dir=data)
    assert "dense: gsm8k_nll:3: 100%" in capsys.readouterr().err
    again = cp.run(recipe(model), tmp_path / "run", data_dir=data, stage=cp.quiet)
    assert not capsys.readouterr().err
    assert again["rows"] == record["rows"]
    assert repr(record).count("\n") < 3
    assert record.verdict in repr(record)
    HTMLParser().feed(html := record._repr_html_())
    assert "magnitude-matrix-0.5" in html
    assert "gsm8k_nll, nats per token" in html
    (page,) = cp.report(str(tmp_path / "run"))
    assert page == tmp_path / "run" / "report.html"
    assert cp.report([tmp_path / "run"], tmp_path / "own.html") == [tmp_path / "own.html"]


def test_a_recipe_may_be_a_file_a_name_or_a_dictionary(tmp_path: Path) -> None:
    from causalprune.runs.recipe import as_recipe

    path = tmp_path / "own.yaml"
    path.write_text("on: []")
    for given, words in (
        (path, "'model' is missing"),
        (str(path), "'model' is missing"),
        ("dem", "did you mean 'demo'"),
        ({"modell": 1}, "did you mean 'model'"),
    ):
        with pytest.raises(OptionError, match=words):
            cp.run(given, tmp_path / "run")
    assert as_recipe("demo").model.name == "embedded"
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_sweep_takes_a_dictionary_without_sparsities(model: Path, data: Path, tmp_path: Path) -> None:
    wanted = {key: value for key, value in recipe(model).items() if key != "sparsities"}
    tried = cp.sweep(wanted, 0.9, str(tmp_path / "sweep"), data_dir=data, stage=cp.quiet)
    assert 1 < len(tried) <= 5
    assert all(round(20 * one.sparsity, 6).is_integer() for one in tried)
    assert repr(tried[0]).startswith(f"Tried({tried[0].sparsity:g}: ")


def test_what_is_saved_is_read_by_plain_names(tmp_path: Path, data: Path) -> None:
    decoder = tiny_decoder()
    pruned = cp.prune(decoder, cp.Method("magnitude", 0.5))
    with pytest.warns(
        UserWarning, match=r"lacks method, sparsity and calibration: save\(decoder, folder, pruned\)"
    ):
        cp.save(decoder, str(tmp_path / "bare"), manifest={}, keep=pruned.keep)
    folder = cp.save(decoder, str(tmp_path / "out"), pruned)
    assert cp.verify(str(folder)).ok
    write_jsonl(tmp_path / "own.jsonl", [{"prompt": f"{i} + {i}?", "target": str(2 * i)} for i in range(8)])
    calibration = cp.calibrate(decoder, [str(tmp_path / "own.jsonl")], n=4, subsets=2)
    effects = cp.attribute(decoder, calibration, estimator=cp.Estimator("gradient"))
    cp.save(decoder, str(tmp_path / "with"), effects=effects)
    assert cp.load_effects(str(tmp_path / "with" / "effects.json")).fingerprint == effects.fingerprint


def test_a_checkpoint_says_how_it_was_made(tmp_path: Path, data: Path) -> None:
    decoder = tiny_decoder()
    calibration = cp.calibrate(decoder, ["gsm8k"], n=4, data_dir=data)
    pruned = cp.prune(decoder, cp.Method("wanda", 0.25), calibration=calibration)
    run = read_manifest(cp.save(decoder, tmp_path / "pruned", pruned))["run"]
    assert (run["method"]["criterion"], run["method"]["sparsity"]) == ("wanda", 0.25)
    assert run["calibration"]["sources"] == {"gsm8k": 4}
    assert load_keep(tmp_path / "pruned").keys() == pruned.keep.keys()
    small = cp.shrink(decoder, 0.05, calibration)
    run = read_manifest(cp.save(small.decoder, tmp_path / "small", small))["run"]
    assert (run["shrink"]["by"], run["calibration"]["sources"]) == ("effect", {"gsm8k": 4})
    effects = cp.attribute(decoder, calibration, estimator=cp.Estimator("gradient"))
    cut = cp.prune(decoder, cp.Method("cap", 0.5), calibration=calibration, effects=effects)
    run = read_manifest(cp.save(decoder, tmp_path / "cap", cut))["run"]
    assert run["effects"]["fingerprint"] == effects.calibration_fingerprint
    assert "calibration" not in run, "it was looked at for the effects alone"
    assert cp.load_effects(tmp_path / "cap" / "effects.json").fingerprint == effects.fingerprint
