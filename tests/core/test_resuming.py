"""A pruning that was stopped anywhere goes on, and ends with the bytes of an undisturbed one."""

from collections import Counter
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
from causalprune.core.resuming import State
from causalprune.models.anatomy import fingerprint
from causalprune.pruning import grading, prune
from causalprune.pruning import layers as pruning
from causalprune.pruning import training as distillation
from causalprune.pruning.methods import Method

EXAMPLES = calibration(((14, 5), (13, 9), (12, 3)))
METHOD = Method("causal", 0.5)
PLACES = {"output_slopes": pruning, "divergence": grading, "refit": pruning, "_gradients": distillation}
OWN = {name: getattr(module, name) for name, module in PLACES.items()}


class StoppedError(Exception):
    """The process ends here."""


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "SELDOM", 0.0)


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


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama3", torch.float32),
        ("llama3", torch.bfloat16),
        ("gpt2", torch.float32),
        ("qwen3_moe", torch.float32),
    ],
)
def test_a_stopped_pruning_goes_on(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, file = fresh(family), tmp_path / "out.pruning"
    whole.model.to(dtype)
    every = counted(monkeypatch)
    expected = prune(whole, METHOD, calibration=EXAMPLES)
    stops = [("output_slopes", 1), ("divergence", 4), ("refit", 3), ("_gradients", 1), ("_gradients", 3)]
    done: Counter[str] = Counter()
    for stop, after in [*stops, ("", 0)]:
        decoder = fresh(family)
        decoder.model.to(dtype)
        count = counted(monkeypatch, stop, after)
        if stop:
            with pytest.raises(StoppedError):
                prune(decoder, METHOD, calibration=EXAMPLES, kept_in=file)
        else:
            found = prune(decoder, METHOD, calibration=EXAMPLES, kept_in=file)
        done += count
    assert fingerprint(decoder.model) == fingerprint(whole.model)
    assert all(torch.equal(found.keep[name], kept) for name, kept in expected.keep.items())
    assert found.unrouted == expected.unrouted
    assert found.response is not None
    assert expected.response is not None
    assert torch.equal(found.response.nats, expected.response.nats)
    assert found.response.members == expected.response.members
    assert done["output_slopes"] == 2  # the one that was stopped, and one more
    assert done["divergence"] <= every["divergence"] + 4
    assert done["refit"] == every["refit"] + 3
    assert done["_gradients"] <= every["_gradients"] + 4


def test_what_is_kept_of_another_pruning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.pruning"
    counted(monkeypatch, "refit", 1)
    with pytest.raises(StoppedError):
        prune(fresh("llama3"), METHOD, calibration=EXAMPLES, kept_in=file)
    with pytest.raises(
        MismatchError, match=r"out\.pruning is of a stopped pruning with other options: delete it"
    ):
        prune(fresh("llama3"), Method("causal", 0.4), calibration=EXAMPLES, kept_in=file)


def test_what_is_kept_and_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    State(tmp_path / "kept", ["a"]).keep(values=torch.ones(9))
    data = (tmp_path / "kept").read_bytes()
    torch.save([1], tmp_path / "other")
    for damaged in (b"", b"no archive", data[: len(data) // 2], (tmp_path / "other").read_bytes()):
        (tmp_path / "kept").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"kept.*is damaged: delete it"):
            State(tmp_path / "kept", ["a"])
    (tmp_path / "kept").unlink()
    (tmp_path / "kept").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*kept"):
        State(tmp_path / "kept", ["a"])


def test_what_is_kept_with_other_effects_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, file = Method("cap", 0.5, update="distill"), tmp_path / "out.pruning"
    effects = attribute(fresh("llama3"), EXAMPLES)
    others = replace(effects, masked_nats=effects.masked_nats.flip(0))
    counted(monkeypatch, "_gradients", 1)
    given = {"calibration": EXAMPLES, "kept_in": file}
    with pytest.raises(StoppedError):
        prune(fresh("llama3"), method, effects=effects, **given)
    with pytest.raises(MismatchError, match="other options"):
        prune(fresh("llama3"), method, effects=others, **given)
    counted(monkeypatch)
    prune(fresh("llama3"), method, effects=effects, **given)


def test_without_room_it_goes_on_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(values: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="begin again: cannot write .*No space left"):
        prune(fresh("llama3"), METHOD, calibration=EXAMPLES, kept_in=tmp_path / "out.pruning")
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_where_nothing_takes_long(tmp_path: Path) -> None:
    prune(fresh("llama3"), Method("wanda", 0.5), calibration=EXAMPLES, kept_in=tmp_path / "out.pruning")
    assert not list(tmp_path.iterdir())


def test_training_is_kept_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "SELDOM", 3600.0)
    assert not State(tmp_path / "x").due()
    assert not State().due()
    monkeypatch.setattr(resuming, "SELDOM", 0.0)
    assert State(tmp_path / "x").due()
    assert not State().due()
