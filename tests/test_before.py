"""What an earlier build has left on disk is read, and what it left half-way goes on (`before/README.md`)."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file

import causalprune as cp

BEFORE = Path(__file__).parent / "before"
CALIBRATION = ["-t", "gsm8k", "-n", "6", "--data-dir", "data", "--batch-tokens", "512"]
CAUSAL = ("--method", "causal", "--sparsity", "0.5", "--preserve", "none", *CALIBRATION)
TASKS = ["-t", "gsm8k_nll:4", "-t", "strategyqa_nll:3", "--data-dir", "data"]
RUN = ("recipe.yaml", "--data-dir", "data")
LABELS = ["dense", "wanda-row-0.5", "cap-global-0.5"]
MARK = 1234.5
"""A loss that no measurement gives: where it comes out, it was read and not measured again."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* was begun with",  # versions of packages have moved on since
    "ignore:.* is an old word:FutureWarning",
)


@pytest.fixture(autouse=True)
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of what the earlier build has left, where its files name each other."""
    monkeypatch.chdir(shutil.copytree(BEFORE, tmp_path / "before"))
    return tmp_path / "before"


@pytest.fixture
def done(run: Run) -> Callable[..., str]:
    """Return the command line as a function that fails with the command, and returns what was printed."""

    def call(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert code == 0, err
        return out

    return call


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def marked(path: str, key: str) -> bytes:
    """Put the mark in place of the first number of a finished row, and return what the ledger holds then."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    (at,) = (number for number, line in enumerate(lines[1:], 1) if json.loads(line)["key"] == key)
    row = json.loads(lines[at])
    del row["crc"]
    numbers = row["value"]["ce"] if "ce" in row["value"] else row["value"][0]["values"]
    numbers[0] = MARK
    rest = json.dumps(row, sort_keys=True, separators=(",", ":"))[1:]
    lines[at] = f'{{"crc":"{zlib.crc32(rest.encode()):08x}",{rest}'
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path).read_bytes()


def values(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Return the losses of a run by label and task."""
    return {(row["label"], one["task"]): one["values"] for row in rows for one in row["results"]}


def same(found: dict[Any, list[float]], expected: dict[Any, list[float]]) -> None:
    """Check that losses are those of the earlier build, but for what another processor rounds differently."""
    assert found.keys() == expected.keys()
    for key, numbers in expected.items():
        assert found[key] == pytest.approx(numbers, rel=1e-3), key


def test_a_checkpoint_is_as_its_manifest_says(done: Callable[..., str]) -> None:
    assert "as the manifest says" in done("verify", "pruned")
    report = cp.verify(Path("pruned"))
    assert report.ok
    assert (report.zeros, report.weights) == (480, 960)


def test_masks_tell_where_zeros_were_lost(run: Run) -> None:
    code, out, _ = run("verify", "model", "--against", "pruned")
    assert code == 1
    assert "lost its zeros" in out


def test_zeros_are_put_back(done: Callable[..., str]) -> None:
    done("reapply", "pruned", "model", "-o", "again")
    own, expected = (load_file(f"{name}/model.safetensors") for name in ("again", "pruned"))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("path", ["attributed/effects.json", "pruned/effects.json", "finished/effects.json"])
def test_effects_are_read_bit_for_bit(path: str, done: Callable[..., str]) -> None:
    effects, written = cp.load_effects(Path(path), cp.load("model")), read(path)
    assert effects.masked_nats.tolist() == written["masked_nats"]["values"]
    assert effects.intact_nats.tolist() == written["intact_nats"]["values"]
    assert [[unit.layer, unit.index, unit.kind] for unit in effects.units] == written["units"]
    assert "head" in done("effects", path)


def test_effects_drive_the_same_pruning(done: Callable[..., str]) -> None:
    cap = ("--method", "cap", "--sparsity", "0.5", "--effects", "attributed/effects.json")
    done("prune", "model", "-o", "again", *cap, *CALIBRATION)
    own, expected = (load_file(f"{name}/keep_masks.safetensors") for name in ("again", "pruned"))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], mask) for name, mask in expected.items())


def test_a_stopped_attribution_goes_on(done: Callable[..., str]) -> None:
    ledger = Path("stopped/attributed/attribution.ledger")
    begun = ledger.read_bytes()
    done("attribute", "model", "-o", "stopped/attributed", *CALIBRATION)
    assert ledger.read_bytes().startswith(begun)
    own, expected = read("stopped/attributed/effects.json"), read("attributed/effects.json")
    for name in ("masked_nats", "intact_nats"):
        numbers = torch.tensor(expected[name]["values"])
        torch.testing.assert_close(torch.tensor(own[name]["values"]), numbers, rtol=1e-5, atol=0)
    for name in ("units", "subset", "tokens", "model_fingerprint", "calibration_fingerprint"):
        assert own[name] == expected[name]


def test_finished_attributions_are_not_measured_again(done: Callable[..., str]) -> None:
    begun = marked("stopped/attributed/attribution.ledger", "0:intact")
    done("attribute", "model", "-o", "stopped/attributed", *CALIBRATION)
    assert Path("stopped/attributed/attribution.ledger").read_bytes().startswith(begun)
    assert MARK in read("stopped/attributed/effects.json")["intact_nats"]["values"]


@pytest.mark.thorough
def test_a_stopped_run_goes_on(done: Callable[..., str]) -> None:
    expected = values(read("finished/results.json")["rows"])
    assert len(values(read("stopped/run/results.json")["rows"])) < len(expected)
    done("run", *RUN, "-o", "stopped/run")
    same(values(read("stopped/run/results.json")["rows"]), expected)


@pytest.mark.thorough
def test_finished_rows_of_a_run_are_not_measured_again(done: Callable[..., str]) -> None:
    begun = marked("stopped/run/results.ledger", "dense/gsm8k_nll:4")
    done("run", *RUN, "-o", "stopped/run")
    assert Path("stopped/run/results.ledger").read_bytes().startswith(begun)
    assert values(read("stopped/run/results.json")["rows"])["dense", "gsm8k_nll"][0] == MARK


@pytest.mark.thorough
def test_a_finished_run_stays_as_it_is(done: Callable[..., str]) -> None:
    rows = read("finished/results.json")["rows"]
    done("run", *RUN, "-o", "finished")
    assert values(read("finished/results.json")["rows"]) == values(rows)


def test_a_stopped_evaluation_goes_on(done: Callable[..., str]) -> None:
    expected = {one["task"]: one["values"] for one in read("dense.json")["results"]}
    marked("stopped/dense.json.ledger", "gsm8k_nll:4")
    done("evaluate", "model", *TASKS, "-o", "stopped/dense.json")
    own = {one["task"]: one["values"] for one in read("stopped/dense.json")["results"]}
    assert own["gsm8k_nll"][0] == MARK
    own["gsm8k_nll"][0] = expected["gsm8k_nll"][0]
    same(own, expected)


def test_results_are_compared(done: Callable[..., str]) -> None:
    table = done("compare", "finished", "dense.json", "--markdown")
    for row in read("finished/results.json")["rows"]:
        assert row["label"] in table
    for one in read("dense.json")["results"]:
        assert f"{sum(one['values']) / sum(one['weights']):.4g}" in table


@pytest.mark.thorough
def test_results_are_reported(done: Callable[..., str]) -> None:
    done("report", "finished", "stopped/run", "-o", "page.html", "--json", "page.json", "--csv", "page.csv")
    page, table = Path("page.html").read_text("utf-8"), Path("page.csv").read_text("utf-8")
    for label in LABELS:
        assert label in page
        assert label in table
    assert read("page.json")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("attribute", "model", "-o", "stopped/attributed", *CALIBRATION), "3 of 6 jobs done"),
        (("evaluate", "model", *TASKS, "-o", "stopped/dense.json"), "1 of 2 tasks done"),
        (("run", *RUN, "-o", "stopped/run"), "5 of 6 measurements done"),
    ],
)
def test_what_is_there_is_said_first(run: Run, words: tuple[str, ...], found: str) -> None:
    code, _, err = run(*words)
    assert code == 0, err
    (said,) = (line for line in err.splitlines() if line.startswith("going on: "))
    assert said.removeprefix("going on: ") == found
    if words[0] != "attribute":  # how many jobs there are is known when the model is
        assert err.startswith("going on: ")


@pytest.mark.parametrize("stopped", ["trials", "training"])
def test_a_stopped_pruning_is_refused_as_training_has_changed(stopped: str, run: Run) -> None:
    before = Path(f"stopped/{stopped}.pruning").read_bytes()
    code, _, err = run("prune", "model", "-o", f"stopped/{stopped}", *CAUSAL)
    assert code == 2
    assert "earlier version, since when" in err
    assert "training remembers no moments of each weight" in err
    assert Path(f"stopped/{stopped}.pruning").read_bytes() == before
