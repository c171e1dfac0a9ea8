"""A pruning that was stopped anywhere goes on, and ends with the bytes of an undisturbed one."""

import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import calibration, fresh

from causalprune.attribution.estimators import attribute
from causalprune.core import resuming
from causalprune.core.errors import CheckpointError, MismatchError
from causalprune.core.resuming import State, forget
from causalprune.interventions import gradients
from causalprune.models.anatomy import fingerprint
from causalprune.pruning import grading, prune, walks
from causalprune.pruning import layers as pruning
from causalprune.pruning import training as distillation
from causalprune.pruning.methods import Method

EXAMPLES = calibration(((14, 5), (13, 9), (12, 3)))
METHOD = Method("causal", 0.5, budgets="graded")
PLACES = {
    "last_hidden": distillation,
    "cross_entropy": gradients,
    "run_layer": walks,
    "divergence": grading,
    "refit": pruning,
    "_last_slope": distillation,
}
OWN = {name: getattr(module, name) for name, module in PLACES.items()}


class StoppedError(Exception):
    """The process ends here."""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "RARELY", 0.0)


def counted(monkeypatch: pytest.MonkeyPatch, stop: str = "", after: int = 0) -> Counter[str]:
    """Count what is done, and stop the `after`-th time that `stop` is."""
    count: Counter[str] = Counter()

    def noted(name: str, *given: Any, **named: Any) -> Any:
        count[name] += 1
        if name == stop and count[name] == after:
            raise StoppedError
        return OWN[name](*given, **named)

    for name, module in PLACES.items():
        monkeypatch.setattr(module, name, partial(noted, name))
    return count


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama3", torch.bfloat16),
        ("gpt2", torch.float32),
        ("qwen3_moe", torch.float32),
    ],
)
def test_a_stopped_pruning_goes_on(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = fresh(family), tmp_path / "out.pruning"
    whole.model.to(dtype)
    every = counted(monkeypatch)
    expected = prune(whole, METHOD, calibration=EXAMPLES, max_batch_tokens=16)
    matrices = every["refit"] // len(whole.layers)
    stops = [
        ("cross_entropy", 2),
        ("divergence", 4),
        ("run_layer", 1),
        ("divergence", 14),
        ("refit", 1),
        ("run_layer", 8),
        ("refit", matrices + 2),
        ("_last_slope", 3),
        ("_last_slope", 4),
    ]
    done: Counter[str] = Counter()
    for stop, after in [*stops, ("", 0)]:
        decoder = fresh(family)
        decoder.model.to(dtype)
        count = counted(monkeypatch, stop, after)
        given = {"calibration": EXAMPLES, "max_batch_tokens": 16, "kept_in": folder}
        if stop:
            with pytest.raises(StoppedError):
                prune(decoder, METHOD, **given)
        else:
            found = prune(decoder, METHOD, **given)
        done += count
    assert fingerprint(decoder.model) == fingerprint(whole.model)
    assert all(torch.equal(found.keep[name], kept) for name, kept in expected.keep.items())
    assert found.unrouted == expected.unrouted
    assert found.response is not None
    assert expected.response is not None
    assert torch.equal(found.response.nats, expected.response.nats)
    assert found.response.members == expected.response.members
    again = {name: done[name] - every[name] for name in PLACES}
    assert done["last_hidden"] == 0  # what training follows comes with the gradients
    assert again["cross_entropy"] == 1  # the batch that was at work
    assert again["_last_slope"] == 2
    assert again["refit"] <= 1 + matrices  # those of the layer that was at work
    assert again["divergence"] <= 4 + 6  # of the group that was at work: three sparsities, so many batches


def test_what_training_follows_is_made_once_where_no_gradients_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, whole, folder = Method("wanda", 0.5, update="distill"), fresh("llama3"), tmp_path / "out.pruning"
    every = counted(monkeypatch)
    prune(whole, method, calibration=EXAMPLES, max_batch_tokens=16)
    done: Counter[str] = Counter()
    for stop, after in (("last_hidden", 2), ("", 0)):
        decoder, count = fresh("llama3"), counted(monkeypatch, stop, after)
        with pytest.raises(StoppedError) if stop else nullcontext():
            prune(decoder, method, calibration=EXAMPLES, max_batch_tokens=16, kept_in=folder)
        done += count
    assert fingerprint(decoder.model) == fingerprint(whole.model)
    assert done["last_hidden"] == every["last_hidden"] + 1 == 4


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_trials_alone_that_were_stopped_say_the_same(
    criterion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, folder = Method(criterion, 0.5, budgets="graded"), tmp_path / "out.pruning"
    given = {"calibration": EXAMPLES, "max_batch_tokens": 16}
    expected = prune(fresh("qwen3_moe"), method, **given)
    counted(monkeypatch, "divergence", 30)  # in the second layer
    with pytest.raises(StoppedError):
        prune(fresh("qwen3_moe"), method, **given, kept_in=folder)
    counted(monkeypatch)
    assert prune(fresh("qwen3_moe"), method, **given, kept_in=folder).record() == expected.record()


@pytest.mark.thorough
def test_what_is_kept_of_another_pruning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.pruning"
    counted(monkeypatch, "refit", 1)
    with pytest.raises(StoppedError):
        prune(fresh("llama3"), METHOD, calibration=EXAMPLES, kept_in=file)
    other = r"other options \(budgets was 'graded' and is now None\)"
    with pytest.raises(MismatchError, match=rf"out\.pruning is of a stopped run with {other}: delete it"):
        prune(fresh("llama3"), Method("causal", 0.4), calibration=EXAMPLES, kept_in=file)


def test_what_is_kept_says_what_is_another_where_that_has_a_name(tmp_path: Path) -> None:
    State(tmp_path, ["a", {"ablation": "zero"}, "b" * 64]).keep(one=1)
    for identity, words in (
        (
            ["a", {"ablation": "mean"}, "b" * 64],
            r"options \(ablation was 'zero' and is now 'mean'\): delete all,",
        ),
        (["a", {"ablation": "zero"}], "options: delete all, or choose another output"),
        (["c", {"ablation": "zero"}, "b" * 64], "options: delete all, or choose another output"),
    ):
        with pytest.raises(MismatchError, match=words):
            State(tmp_path, identity, whole="all")


def test_what_is_kept_and_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    State(tmp_path / "kept", ["a"]).keep(ones=torch.ones(9), other=1)
    file = tmp_path / "kept" / "ones"
    data = file.read_bytes()
    torch.save([1], tmp_path / "other")
    for damaged in (b"", b"no archive", data[: len(data) // 2], (tmp_path / "other").read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"kept.ones, .* is damaged: delete .*kept to begin again"
        ) as e:
            State(tmp_path / "kept", ["a"])
        assert e.value.path == tmp_path / "kept"
    file.unlink()
    assert State(tmp_path / "kept", ["a"]).values == {"other": 1}
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*kept.ones"):
        State(tmp_path / "kept", ["a"])


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Another process that keeps what it has finished at the same place is refused; this one may go on there."""
    place = tmp_path / "kept"
    code = (
        "import sys; from pathlib import Path; from causalprune.core.resuming import State\n"
        "state = State(Path(sys.argv[1])); state.keep(number=1); print('there', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "there\n"
    with pytest.raises(CheckpointError, match="is in use by another run: wait for it"):
        State(place)
    other.communicate("")
    first = State(place)
    first.keep(number=2)
    assert State(place).values == {"number": 2}


def test_values_come_back_one_by_one_and_half_written_ones_do_not(tmp_path: Path) -> None:
    state = State(tmp_path / "kept", ["a"])
    state.hold(large=torch.ones(3), small=0)
    assert not (tmp_path / "kept").exists()
    state.keep(small=1)
    state.flush(other=[2])
    (tmp_path / "kept" / "large.partial-7").write_bytes(b"half")
    found = State(tmp_path / "kept", ["a"]).values
    assert torch.equal(found.pop("large"), torch.ones(3))
    assert found == {"small": 0, "other": [2]}
    assert not list((tmp_path / "kept").glob("*.partial-*"))
    forget(tmp_path / "kept")
    forget(tmp_path / "kept")
    assert not list(tmp_path.iterdir())


def test_what_an_earlier_version_kept_is_refused(tmp_path: Path) -> None:
    torch.save({"identity": '["a"]', "values": {"trials": [[1.0]], "slopes": {}}}, tmp_path / "kept")
    with pytest.raises(MismatchError, match=r"earlier version, since when .* moments .*delete it"):
        State(tmp_path / "kept", ["a"])


def test_a_value_is_read_anew_and_dropped(tmp_path: Path) -> None:
    state = State(tmp_path / "kept", ["a"], needed=True)
    state.flush(one=torch.ones(2), two=3)
    assert torch.equal(state.read("one"), torch.ones(2))
    state.drop(["one", "three"])
    assert State(tmp_path / "kept", ["a"]).values == {"two": 3}


def test_where_what_is_kept_is_needed_no_room_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(values: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    state = State(tmp_path / "kept", ["a"], needed=True)
    state.keep(one=1)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left.*the same command goes on"):
        state.keep(two=2)
    assert State(tmp_path / "kept", ["a"]).values == {"one": 1}


@pytest.mark.thorough
def test_what_is_kept_with_other_effects_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, file = Method("cap", 0.5, update="distill"), tmp_path / "out.pruning"
    effects = attribute(fresh("llama3"), EXAMPLES)
    others = replace(effects, masked_nats=effects.masked_nats.flip(0))
    counted(monkeypatch, "_last_slope", 1)
    given = {"calibration": EXAMPLES, "kept_in": file}
    with pytest.raises(StoppedError):
        prune(fresh("llama3"), method, effects=effects, **given)
    with pytest.raises(MismatchError, match="other options"):
        prune(fresh("llama3"), method, effects=others, **given)
    counted(monkeypatch)
    prune(fresh("llama3"), method, effects=effects, **given)


@pytest.mark.thorough
def test_without_room_it_goes_on_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(values: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="nothing more is kept, .*: cannot write .*No space left") as said:
        prune(fresh("llama3"), METHOD, calibration=EXAMPLES, kept_in=tmp_path / "out.pruning")
    assert len(said) == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_where_nothing_takes_long(tmp_path: Path) -> None:
    prune(fresh("llama3"), Method("wanda", 0.5), calibration=EXAMPLES, kept_in=tmp_path / "out.pruning")
    assert not list(tmp_path.iterdir())


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], [0.125]

    def slow(value: Any, path: Path) -> None:
        path.touch()
        now[0] += took[0]

    monkeypatch.setattr(resuming, "EVERY", 10.0)
    monkeypatch.setattr(resuming, "RARELY", 20.0)
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch, "save", slow)
    state = State(tmp_path / "x")
    due = []
    for _ in range(60):
        now[0] += 1.0
        due.append(state.due())
        if due[-1]:
            state.flush(large=1)
            took[0] = 1.0
    assert [at for at, one in enumerate(due, 1) if one] == [10, 20, 40, 60]
    now[0] += 1e9
    assert not State().due()
