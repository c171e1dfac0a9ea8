"""The ledger survives a kill at any byte, and notices every other kind of damage."""

import errno
import math
import os
import struct
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalprune.core.errors import CheckpointError, MismatchError
from causalprune.core.ledger import FORMAT, Ledger, _line, read_rows

IDENTITY: dict[str, Any] = {"model": "abc", "calibration": "def", "options": {"k": 3, "seed": 0}}
JOBS: dict[str, list[float]] = {"intact/0": [0.1, -0.0], "0.3/0": [1e-310, 2.5, 1 / 3], "é/1": []}


def finish(path: Path) -> dict[str, list[float]]:
    """Do the jobs that the ledger lacks and return all its rows."""
    with Ledger(path, IDENTITY) as ledger:
        for key, value in JOBS.items():
            if key not in ledger.rows:
                ledger.append(key, value)
        return dict(ledger.rows)


@pytest.mark.thorough
def test_a_cut_at_every_byte_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    rows = finish(path)
    whole = path.read_bytes()
    assert rows == JOBS
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert finish(path) == rows
        assert path.read_bytes() == whole


def test_rows_before_the_cut_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    finish(path)
    path.write_bytes(path.read_bytes()[:-1])
    with Ledger(path, IDENTITY) as ledger:
        assert list(ledger.rows) == list(JOBS)[:-1]


def test_a_flipped_byte_before_the_last_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    finish(path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n")
    for position in range(last):  # the newline before the last row itself: both rows are then redone
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match=r"ledger\.jsonl, line \d"):
            finish(path)


def test_a_damaged_last_row_is_redone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    finish(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"\0\0\0")
    assert finish(path) == JOBS
    assert path.read_bytes() == whole


def test_the_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    finish(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + b"garbage\n" + lines[2])
    with pytest.raises(CheckpointError, match="line 3"):
        finish(path)


def test_a_file_that_is_no_ledger_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(CheckpointError, match=r"notes\.txt, line 1: not a ledger"):
        finish(path)
    assert path.read_text() == "my notes"


@pytest.mark.parametrize(
    ("identity", "key"),
    [
        ({**IDENTITY, "calibration": "xyz"}, "calibration"),
        ({**IDENTITY, "extra": 1}, "extra"),
        ({k: v for k, v in IDENTITY.items() if k != "model"}, "model"),
        ({**IDENTITY, "options": {"k": 5, "seed": 0}}, "options.k"),
    ],
)
def test_another_identity_is_refused_and_named(tmp_path: Path, identity: dict[str, Any], key: str) -> None:
    path = tmp_path / "ledger.jsonl"
    finish(path)
    whole = path.read_bytes()
    with pytest.raises(MismatchError, match=f"{key} was .* delete the file"), Ledger(path, identity):
        pass
    assert path.read_bytes() == whole


@pytest.mark.parametrize("end", ["error", "kill"])
def test_a_file_without_rows_is_nobodys(tmp_path: Path, end: str) -> None:
    path = tmp_path / "ledger.jsonl"
    if end == "error":
        with pytest.raises(KeyError), Ledger(path, {"model": "else"}):
            raise KeyError
        assert not path.exists()
    else:
        path.write_bytes(_line({"format": FORMAT, "identity": {"model": "else"}}, "the header"))
    assert finish(path) == JOBS


def test_what_is_another_is_told_in_words(tmp_path: Path) -> None:
    path, (one, other) = tmp_path / "ledger.jsonl", ("a" * 64, "b" * 64)
    known = {"model": one, "problems": one, "batches": one, "effect": "ce", "decide_batches": one}
    known["estimator"] = {"max_batch_tokens": 2048}
    with Ledger(path, {"behaviours": [known, known]}) as ledger:
        ledger.append("a", 1)
    for changed, words in (
        (("model", "problems", "batches", "effect"), "the model is another"),
        (("problems", "batches", "effect"), r"the set of problems \(--task, .*\) is another"),
        (("batches", "effect", "decide_batches"), "behaviours.effect was 'ce' and is now"),
        (("batches", "decide_batches"), r"problems are batched \(--batch-tokens\) is another"),
        ((), r"run: the number of tokens of a batch \(--batch-tokens\) was 2048 and is now 600:"),
    ):
        own = known | {key: "kl" if key == "effect" else other for key in changed}
        if not changed:
            own["estimator"] = {"max_batch_tokens": 600}
        with pytest.raises(MismatchError, match=words) as error, Ledger(path, {"behaviours": [known, own]}):
            pass
        assert one not in str(error.value)
        assert error.value.path == path


def test_order_of_the_identity_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    finish(path)
    with Ledger(path, dict(reversed(IDENTITY.items()))) as ledger:
        assert ledger.rows == JOBS


def test_a_second_opener_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, IDENTITY), pytest.raises(CheckpointError, match=r"ledger\.jsonl is in use"):
        finish(path)
    assert finish(path) == JOBS


@pytest.mark.thorough
def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    script = (
        "import sys, pathlib\nfrom causalprune.core.ledger import FORMAT, Ledger, _line, read_rows\n"
        "with Ledger(pathlib.Path(sys.argv[1]), {}): pass"
    )
    with Ledger(path, {}):
        command = [sys.executable, "-c", script, str(path)]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert f"CheckpointError: ledger {path} is in use" in other.stderr.replace("causalprune.core.errors.", "")


def test_a_key_is_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, IDENTITY) as ledger:
        ledger.append("a", 1)
        with pytest.raises(CheckpointError, match="already has a row for job 'a'"):
            ledger.append("a", 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[-1]]))
    with pytest.raises(CheckpointError, match="line 3: second row for job 'a'"):
        finish(path)


def test_append_needs_an_open_ledger(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not open"):
        Ledger(tmp_path / "ledger.jsonl", IDENTITY).append("a", 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, IDENTITY) as ledger:
        with pytest.raises(CheckpointError, match="job 'a' holds a value that is not finite"):
            ledger.append("a", [1.0, value])
        ledger.append("a", [1.0])
    with Ledger(path, IDENTITY) as ledger:
        assert ledger.rows == {"a": [1.0]}


def test_a_failed_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    pwrite = os.pwrite

    def full_disk(fd: int, data: bytes, offset: int) -> int:
        pwrite(fd, data[:5], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger(path, IDENTITY) as ledger:
        ledger.append("a", [1.0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full_disk)
            with pytest.raises(CheckpointError, match=r"No space left on device \(.* GB free\)"):
                ledger.append("b", [2.0])
        ledger.append("b", [2.0])
    with Ledger(path, IDENTITY) as ledger:
        assert ledger.rows == {"a": [1.0], "b": [2.0]}


def bits(values: list[float]) -> bytes:
    """Return the bytes of the values, which tell -0.0 from 0.0."""
    return struct.pack(f"{len(values)}d", *values)


@pytest.mark.thorough
@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False)), key=st.text())
def test_float64_values_return_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], key: str
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    with Ledger(path, {}) as ledger:
        ledger.append(key, values)
    with Ledger(path, {}) as ledger:
        assert bits(ledger.rows[key]) == bits(values)


@pytest.mark.thorough
@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_float32_tensors_return_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    tensor = torch.tensor(values, dtype=torch.float32)
    with Ledger(path, {}) as ledger:
        ledger.append("a", tensor.tolist())
    with Ledger(path, {}) as ledger:
        back = torch.tensor(ledger.rows["a"], dtype=torch.float32)
    assert torch.equal(back.view(torch.int32), tensor.view(torch.int32))


def test_rows_can_be_read_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with Ledger(path, {"seed": 0}) as book:
        book.append("a", 1)
        with path.open("ab") as file:
            file.write(b'{"crc":"0')  # the row that is being written
        assert read_rows(path) == {"a": 1}
    damaged = path.read_bytes().replace(b'"value":1', b'"value":2')
    path.write_bytes(damaged + b"\n")
    with pytest.raises(CheckpointError, match="line 2"):
        read_rows(path)
    path.write_bytes(b"something else\n")
    with pytest.raises(CheckpointError, match="not a ledger"):
        read_rows(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_rows(tmp_path / "nowhere")


def test_a_ledger_in_use_is_waited_for_where_asked(tmp_path: Path) -> None:
    path, rows = tmp_path / "ledger.jsonl", list[dict[str, Any]]()

    def other() -> None:
        waits = pytest.warns(UserWarning, match=r"waiting for another run, which writes .*ledger\.jsonl")
        with waits, Ledger(path, IDENTITY, wait=True) as ledger:
            rows.append(dict(ledger.rows))

    with Ledger(path, IDENTITY) as ledger:
        waiting = threading.Thread(target=other)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        ledger.append("late", 1)
    waiting.join(10)
    assert rows == [{"late": 1}]


def test_a_ledger_that_is_removed_while_waited_for_takes_no_rows(tmp_path: Path) -> None:
    path, errors = tmp_path / "ledger.jsonl", list[str]()

    def other() -> None:
        try:
            with pytest.warns(UserWarning, match="waiting"), Ledger(path, IDENTITY, wait=True):
                errors.append("entered")
        except CheckpointError as error:
            errors.append(str(error))

    with Ledger(path, IDENTITY):
        waiting = threading.Thread(target=other)
        waiting.start()
        waiting.join(0.2)
        path.unlink()
    waiting.join(10)
    assert errors == [f"ledger {path} was removed meanwhile: run this again"]


def earlier(path: Path, identity: dict[str, Any]) -> bytes:
    """Return the bytes of a ledger that a release without versions began."""
    header = _line({"format": FORMAT, "identity": identity}, "the header")
    path.write_bytes(header)
    return header


def test_an_earlier_version_goes_on_only_where_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    begun = earlier(path, IDENTITY)
    with Ledger(path, IDENTITY) as ledger:
        ledger.append("a", [1.0])
    assert path.read_bytes().startswith(begun)
    for other, unchanged in ((IDENTITY, False), ({**IDENTITY, "calibration": "x"}, True)):
        with (
            pytest.raises(
                MismatchError, match=r"begun by version 1 of the method, and since then prompt and target"
            ),
            Ledger(path, other, unchanged=partial(bool, unchanged)),
        ):
            pass
