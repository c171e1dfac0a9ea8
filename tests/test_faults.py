"""The rows of docs/faults.md that need a process of their own, or two: what a run survives, and what it leaves."""

import fcntl
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from disturbed import KILLED, STAGES
from families import FAMILIES
from reference import fresh
from tinydata import tiny_decoder, write_jsonl, write_model

from causalprune.checkpoints import saving as checkpoint
from causalprune.checkpoints.saving import read_manifest, save
from causalprune.core.errors import CheckpointError, ModelError
from causalprune.models.loading import load

KILLS = 12
every_stage = pytest.mark.parametrize("stage", STAGES)
pytestmark = pytest.mark.xdist_group("faults")


@pytest.fixture(scope="session")
def disturbed() -> Iterator[dict[str, Any]]:
    """Return what came of runs that were killed, interrupted, without room and without permission."""
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's own, which only its owner may enter
        Path(folder).chmod(0o755)
        script = Path(__file__).with_name("disturbed.py")
        command = [sys.executable, str(script), folder, "--kills", str(KILLS), "--faults"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout)


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_as_undisturbed_ones(disturbed: dict[str, Any]) -> None:
    kills = disturbed["kills"]
    assert [kill["stage"] for kill in kills] == [list(KILLED)[i % len(KILLED)] for i in range(KILLS)]
    assert not [kill for kill in kills if kill["lost"]]
    assert any(not kill["complete"] for kill in kills), "every kill came too late: the test is blind"
    assert any(kill["rows"] > 1 for kill in kills), "nothing was finished before any kill: the test is blind"


@every_stage
@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(disturbed: dict[str, Any], stage: str) -> None:
    found = disturbed["faults"][f"{stage} interrupted"]
    assert found["code"] == 130
    assert "the same command goes on from there" in found["said"]
    assert "Traceback" not in found["said"]
    assert found["resumed"]
    if stage == "attribution":
        assert "attribution.ledger" in found["files"]
    else:
        assert found["left"] in ([], [f"{stage}-stopped"])


def errors(said: str) -> list[str]:
    """Return the lines that are not about progress, which depends on how busy the machine is."""
    return [line for line in said.splitlines() if line.startswith("error: ") or "Traceback" in line]


@every_stage
@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_nothing_partial(disturbed: dict[str, Any], stage: str) -> None:
    found = disturbed["faults"][f"{stage} without room"]
    assert found["code"] == 2
    assert "File too large" in found["said"]
    assert "GB free" in found["said"]
    assert len(errors(found["said"])) == 1
    assert found["files"] == (["attribution.ledger"] if stage == "attribution" else [])
    assert found["left"] == (["attribution-full"] if stage == "attribution" else [])
    assert found["resumed"]


@every_stage
@pytest.mark.slow
def test_a_folder_without_permission_is_refused(disturbed: dict[str, Any], stage: str) -> None:
    found = disturbed["faults"][f"{stage} without permission"]
    assert found["code"] == 2
    assert "forbidden" in found["said"]
    assert "Permission denied" in found["said"] or "may write to" in found["said"]
    assert len(errors(found["said"])) == 1
    assert not found["left"]
    assert found["resumed"]


@pytest.mark.thorough
def test_a_run_folder_in_use_is_refused(run: Run, tmp_path: Path) -> None:
    model, own = tmp_path / "model", tmp_path / "own.jsonl"
    decoder = tiny_decoder()
    write_model(model, decoder)
    write_jsonl(own, [{"prompt": f"Say {i}.", "target": f" {i}"} for i in range(6)])
    command = ("attribute", model, "-o", tmp_path / "out", "-t", own, "-n", 4)
    (tmp_path / "out").mkdir()
    holder = os.open(tmp_path / "out" / "attribution.ledger", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        code, _, err = run(*command)
    finally:
        os.close(holder)
    assert code == 2
    assert "attribution.ledger is in use by another run: wait for it or choose another folder" in err
    assert not (tmp_path / "out" / "effects.json").exists()
    assert run(*command)[0] == 0


def test_of_two_that_save_to_one_folder_the_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = checkpoint.write_manifest

    def meanwhile(folder: Path, *rest: Any) -> None:
        monkeypatch.setattr(checkpoint, "write_manifest", own)
        save(fresh("llama3"), tmp_path / "out", manifest={"run": "the other"})
        own(folder, *rest)

    monkeypatch.setattr(checkpoint, "write_manifest", meanwhile)
    pids = itertools.count()
    monkeypatch.setattr(os, "getpid", lambda: next(pids))  # as two processes have
    with (
        pytest.warns(UserWarning, match=r"out\.partial-0-\w+ is of a run that was killed, or is not over"),
        pytest.raises(CheckpointError, match=r"cannot save to .*out: .*not empty"),
    ):
        save(fresh("llama2"), tmp_path / "out", manifest={"run": "the first to begin"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_manifest(tmp_path / "out")["run"] == {"run": "the other"}


def test_what_another_process_is_writing_is_not_said_to_be_left(tmp_path: Path) -> None:
    (tmp_path / f"out.partial-{os.getppid()}-abc").mkdir()
    save(fresh("llama3"), tmp_path / "out")


def test_in_a_container_a_killed_run_may_have_had_the_same_number(tmp_path: Path) -> None:
    for left in (f"out.partial-{os.getpid()}", f"out.partial-{os.getpid()}-abc", f"out.old-{os.getpid()}"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").touch()
    for overwrite in (False, True):
        with pytest.warns(UserWarning, match=r"is of a run that was killed, or is not over"):
            save(fresh("llama3"), tmp_path / "out", overwrite=overwrite)
    assert read_manifest(tmp_path / "out")


@pytest.mark.thorough
def test_a_flipped_bit_in_a_header_is_noticed_on_loading(tmp_path: Path) -> None:
    FAMILIES["llama3"]().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    data, intact = file.read_bytes(), load(str(tmp_path / "model")).fingerprint
    header = 8 + int.from_bytes(data[:8], "little")
    dice, refused = random.Random(0), 0
    for _ in range(40):
        at, bit = dice.randrange(header), dice.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        try:
            found = load(str(tmp_path / "model")).fingerprint
        except ModelError:
            refused += 1
            continue
        assert found == intact, f"bit {bit} of byte {at}"
    assert refused > 30
