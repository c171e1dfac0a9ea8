"""The commands that find circuits and compare them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run, assert_refused
from tinydata import tiny_decoder, write_data, write_jsonl, write_model

from causalprune.circuits import load_circuit
from causalprune.runs import circuits
from causalprune.runs.cells import load
from causalprune.runs.recipe import ModelSpec

QUICK = ("--controls", 3, "--rescore", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, its data, and a circuit of it."""
    folder = tmp_path_factory.mktemp("circuits")
    write_data(folder / "data", rows=60)
    write_model(folder / "model")
    return folder


def find(run: Run, place: Path, output: str, *options: object) -> tuple[int, str, str]:
    words = ("circuit", place / "model", "-o", place / output, "--data-dir", place / "data")
    return run(*words, *options)


@pytest.mark.thorough
def test_a_circuit_is_found_shown_and_goes_on(run: Run, place: Path) -> None:
    options = (
        "-t",
        "gsm8k:24",
        *QUICK,
        "--units",
        "heads",
        "--units",
        "neurons:16",
        "--tests",
        "--save",
        place / "alone",
    )
    code, out, err = find(run, place, "one", *options)
    assert code == 0, err
    for words in (
        "CMD",
        "necessity",
        "controls",
        "completeness",
        "sufficiency",
        "minimality",
        "the circuit alone",
    ):
        assert words in out
    before = (place / "one" / "circuit.json").read_bytes()
    code, out, err = find(run, place, "one", *options[:-2], "--json")
    assert code == 0, err
    assert (place / "one" / "circuit.json").read_bytes() == before
    told, found = json.loads(out), load_circuit(place / "one")
    assert told["size"] == found.size
    assert told["chosen"]["units"] == found.size
    assert len(told["curve"]["points"]) == 10
    assert found.description["model_spec"]["name"] == str(place / "model")
    code, out, err = run(
        "evaluate",
        place / "alone",
        "--on",
        "gsm8k_nll:4",
        "--data-dir",
        place / "data",
        "-o",
        place / "a.json",
    )
    assert code == 0, err


@pytest.mark.thorough
def test_what_decides_is_measured_apart(run: Run, place: Path) -> None:
    write_jsonl(
        place / "test.jsonl", [{"prompt": f"{i} + 1?", "target": f"It is {i + 1}."} for i in range(12)]
    )
    code, _, err = find(
        run,
        place,
        "two",
        "-t",
        "arc_challenge:12",
        "--on",
        f"{place / 'test.jsonl'}_nll:10",
        *QUICK,
        "--keep",
        0.85,
    )
    assert code == 0, err
    found = load_circuit(place / "two")
    assert len(found.problems) == 10
    assert found.description["problems"] == {"scored": 12, "decided": 10}


def test_a_plan_loads_nothing(run: Run, place: Path) -> None:
    code, out, err = find(
        run, place, "none", "-t", "gsm8k:48", "--on", "gsm8k_nll:100", "--dry-run", "--json"
    )
    assert code == 0, err
    plan = {row["stage"]: row for row in json.loads(out)["plan"]}
    assert plan["scores"] == {"stage": "scores", "problems": 48, "passes": 25.0}
    assert plan["gates"] == {"stage": "gates", "problems": 48, "passes": 31.0}
    for words, scores, gates in (
        (("--effect", "ce"), 45.0, None),
        (("--ablation", "counterfactual", "--rank", "signed"), 45.0, None),
        (("--ablation", "counterfactual"), 15.0, 31.0),
    ):
        code, out, err = find(run, place, "none", "-t", "ioi:48", *words, "--dry-run", "--json")
        assert code == 0, err
        passes = {row["stage"]: row["passes"] for row in json.loads(out)["plan"]}
        assert (passes["scores"], passes.get("gates")) == (scores, gates), words
    assert plan["sizes"]["problems"] == 100
    rows = write_jsonl(place / "rows.jsonl", [{"prompt": f"{i}?", "target": "Yes."} for i in range(11)])
    code, out, err = find(
        run, place, "none", "-t", "gsm8k:48", "--on", f"{rows}_nll", "--tests", "--dry-run", "--json"
    )
    assert code == 0, err
    plan = {row["stage"]: row for row in json.loads(out)["plan"]}
    assert plan["sizes"]["problems"] == 11
    assert plan["completeness"]["passes"] == 82.0  # the tests have a line of their own
    assert not (place / "none").exists()


@pytest.mark.thorough
def test_pairs_from_templates(run: Run, place: Path) -> None:
    options = (
        "-t",
        "ioi:20",
        "--ablation",
        "counterfactual",
        "--estimator",
        "relevance",
        *QUICK,
        "--keep",
        0.98,
    )
    code, _, err = find(run, place, "ioi", *options)
    assert code == 0, err
    assert load_circuit(place / "ioi").problems[0].instead is not None


def test_effects_say_that_they_do_not_look_at_a_wrong_answer(run: Run, place: Path) -> None:
    words = ("attribute", place / "model", "-o", place / "effects", "-t", "ioi", "-n", 3)
    with pytest.warns(UserWarning, match="3 examples come with a wrong answer .* `causalprune circuit`"):
        code, _, err = run(*words, "--estimator", "gradient", "--data-dir", place / "data")
    assert code == 0, err


@pytest.mark.thorough
def test_circuits_are_compared(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[ModelSpec] = []
    for name, task in (("a", "gsm8k:20"), ("b", "strategyqa:20")):
        code, _, err = find(run, place, name, "-t", task, *QUICK, "--keep", 0.8)
        assert code == 0, err
    code, out, err = run(
        "overlap", place / "a", place / "b" / "circuit.json", "-o", place / "both", "--remove", 2, "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["names"] == ["a", "b"]
    assert told["removed"] == [2, 2]
    assert told["shared"][0][0] == load_circuit(place / "a").size
    assert {"value", "low", "high"} == set(told["removal"][0][1])
    before = (place / "both" / "overlap.json").read_bytes()
    assert run("overlap", place / "a", place / "b", "-o", place / "both", "--remove", 2)[0] == 0
    assert (place / "both" / "overlap.json").read_bytes() == before
    record = json.loads((place / "a" / "circuit.json").read_text())
    assert not {"trust_remote_code", "allow_pickle", "device"} & record["description"]["model_spec"].keys()
    record["description"]["model_spec"] |= {
        "trust_remote_code": True,
        "unheard": 1,
    }  # a file of somebody else's
    (place / "theirs.json").write_text(json.dumps(record))
    words = ("overlap", place / "theirs.json", place / "b", "-o", place / "third", "--dtype", "float32")
    with monkeypatch.context() as patch:
        patch.setattr(circuits, "load", lambda spec: loaded.append(spec) or load(spec))
        assert run(*words)[0] == 0
    assert [(spec.trust_remote_code, spec.dtype) for spec in loaded] == [(False, "float32")]
    write_model(place / "other", tiny_decoder(chat=True, positions=512))
    (record := json.loads((place / "b" / "circuit.json").read_text()))["model_fingerprint"] = "else"
    (place / "c.json").write_text(json.dumps(record))
    outcome = run("overlap", place / "a", place / "c.json", "-o", place / "no")
    assert_refused(outcome, "are circuits of different models", place / "no")
    assert_refused(run("overlap", place / "a", "-o", place / "no"), "at least two circuits", place / "no")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep", "1.2"), "above 0 and at most 1, not 1.2"),
        (("--on", "gsm8k_answers"), "sizes are decided by losses of problems, as in gsm8k_nll:100"),
        (("--on", "wikitext2_ppl"), "sizes are decided by losses of problems"),
        (("--units", "experts"), "has no units of kind 'expert'"),
        (("--units", "neuron"), "did you mean 'neurons'"),
        (("--units", "neurons:8:effect"), "groups of neurons by effect are others on every set of problems"),
        (("--rescore", "0"), "at least 1 round, not 0"),
        (("--keep", "2", "--dry-run"), "above 0 and at most 1, not 2"),
        (("--ablation", "counterfactual"), "needs a counterfactual of every example"),
        (("--ablation", "mean", "--save", "x"), "--save writes zeros"),
        (("--rank", "signed", "--effect", "kl"), "a divergence has no sign"),
        (("--estimator", "exact", "--rescore", "3"), "ask for 1 round (--rescore 1)"),
        (("--rank", "signed", "--learn", "2"), "no epochs with --rank signed"),
        (("--estimator", "relevance", "--effect", "kl"), "needs the effect 'ce'"),
        (("--on", "gsm8k_nll:5"), "5 problems to decide on (--on) are too few to resample"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    run: Run, place: Path, options: tuple[str, ...], words: str
) -> None:
    assert_refused(find(run, place, "refused", "-t", "gsm8k:16", *options), words, place / "refused")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-t", "gsm8k", "--ablation", "mean", "--save", "x"), "--save writes zeros"),
        (("-t", "gsm8k", "--save", "{place}/none"), "--save and --output are one folder"),
        (("-t", "gsm8k", "--save", "{place}/model"), "model exists"),
        (("-t", "gsm8k", "--estimator", "relevance", "--effect", "kl"), "needs the effect 'ce'"),
        (
            ("-t", "gsm8k", "--estimator", "adaptive", "--ablation", "resample"),
            "another estimator than 'adaptive'",
        ),
        (("-t", "gsm8k", "--ablation", "counterfactual"), "needs a counterfactual of every example"),
        (
            ("-t", "{place}/ten.jsonl", "--ablation", "counterfactual"),
            "needs a counterfactual of every example",
        ),
        (("-t", "gsm8k:6"), "of 6 problems (--task) 3 are to score on and 3 to decide on"),
        (("-t", "{place}/ten.jsonl"), "of 10 problems (--task) 5 are"),
        (("-t", "gsm8k:16", "--on", "gsm8k_nll:4"), "4 problems to decide on (--on) are too few"),
        (("-t", "nothere.jsonl"), "cannot read nothere.jsonl"),
    ],
)
def test_a_plan_refuses_what_the_search_would(
    run: Run, place: Path, options: tuple[str, ...], words: str
) -> None:
    rows = [{"prompt": f"{i} + 1?", "target": f"It is {i + 1}."} for i in range(10)]
    write_jsonl(place / "ten.jsonl", rows)
    own = (option.format(place=place) for option in options)
    assert_refused(find(run, place, "none", *own, "--dry-run"), words, place / "none")


def test_another_search_is_refused_in_words_and_overwritten_where_asked(run: Run, place: Path) -> None:
    options = ("-t", "gsm8k:16", "--estimator", "gradient", "--learn", 1, "--keep", 0.3, "--controls", 1)
    assert find(run, place, "kept", *options)[0] == 0
    other = tiny_decoder()
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.5)
    write_model(place / "changed", other)
    words = ("circuit", place / "changed", "-o", place / "kept", "--data-dir", place / "data", *options)
    code, _, err = run(*words)
    assert (code, "belongs to another run: the model is another: delete the folder" in err) == (2, True)
    ledger = place / "kept" / "circuit.ledger"
    begun = ledger.read_bytes()
    assert find(run, place, "kept", *options, "--overwrite")[0] == 0
    assert ledger.read_bytes() == begun, "the same search goes on"
    assert run(*words, "--overwrite")[0] == 0
    assert (
        load_circuit(place / "kept").model_fingerprint == load(ModelSpec(str(place / "changed"))).fingerprint
    )
    assert run(*words)[0] == 0


def test_a_model_is_found_from_another_folder_and_named_where_it_moved(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    write_model(Path("here"))
    options = ("-t", "gsm8k:16", "--data-dir", "data", "--estimator", "gradient", "--learn", 0, "--keep", 0.3)
    code, _, err = run("circuit", "here", "-o", "c1", *options, "--controls", 1, "--save", "c1alone")
    assert code == 0, err
    assert str(place) not in (place / "c1alone" / "causalprune.json").read_text()
    shutil.copytree("c1", "c2")
    (place / "sub").mkdir()
    monkeypatch.chdir(place / "sub")
    words = ("overlap", "../c1", "../c2", "-o", "both", "--remove", 1)
    code, _, err = run(*words)
    assert code == 0, err
    (place / "here").rename(place / "there")
    code, _, err = run(*words)
    assert (code, f"the model of ../c1: no file or folder '{place / 'here'}'" in err) == (2, True)
    assert run(*words, "--model", "../there")[0] == 0


def test_circuits_made_in_python_or_of_the_current_folder_are_compared_too(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-t", "gsm8k:16", "--estimator", "gradient", "--learn", 0, "--keep", 0.3, "--controls", 1)
    assert find(run, place, "mine", *options)[0] == 0
    shutil.copytree(place / "mine", place / "yours")
    monkeypatch.chdir(place / "mine")
    words = ("-o", place / "ours", "--remove", 2, "--json")
    code, out, err = run("overlap", "circuit.json", "../yours", *words)
    assert code == 0, err
    assert json.loads(out)["names"] == ["mine", "yours"]
    record = json.loads(Path("circuit.json").read_text())
    del record["description"]["model_spec"]  # which `cp.circuit` does not write
    Path("circuit.json").write_text(json.dumps(record))
    outcome = run("overlap", ".", "../yours", "-o", place / "no")
    assert_refused(outcome, "does not say which model it is of, as it was not written by", place / "no")
    assert "name it (--model)" in outcome[2]
    code, out, err = run("overlap", ".", "../yours", *words, "--model", place / "model")
    assert code == 0, err
    assert json.loads(out)["names"] == ["mine", "yours"]


def test_a_finished_search_that_is_started_again_and_stopped_has_its_checks(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-t", "gsm8k:16", "--estimator", "gradient", "--learn", 0, "--keep", 0.3, "--controls", 1)
    assert find(run, place, "whole", *options)[0] == 0
    before = (place / "whole" / "circuit.json").read_bytes()

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(circuits, "examined", stopped)
        assert find(run, place, "whole", *options)[0] == 130
    assert (place / "whole" / "circuit.json").read_bytes() == before
