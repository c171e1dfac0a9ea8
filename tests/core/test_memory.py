"""Where memory runs out: fewer sequences at once, and an error that says what takes less."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from tinydata import tiny_decoder

from causalprune.core import memory
from causalprune.core.provenance import peak_bytes
from causalprune.evaluation.measures import evaluate


@pytest.mark.parametrize("task", ["gsm8k_nll", "gsm8k_cot:6", "arc_challenge"])
def test_without_memory_a_task_goes_on_with_fewer_at_once_and_it_is_said(
    data: Path, task: str, recwarn: pytest.WarningsRecorder
) -> None:
    how: dict[str, Any] = {"data_dir": data, "max_new_tokens": 5, "batch_tokens": 9999}
    whole = evaluate(tiny_decoder(), [task], **how)
    decoder, sizes, told = tiny_decoder(), list[int](), list[tuple[int, int]]()

    def crowded(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        sizes.append(len(named["input_ids"] if "input_ids" in named else args[0]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    decoder.model.register_forward_pre_hook(crowded, with_kwargs=True)
    found = evaluate(decoder, [task], on_progress=lambda *now: told.append(now), **how)
    said = [str(warning.message) for warning in recwarn if "out of memory" in str(warning.message)]
    assert said
    assert sizes[-1] == 1 < max(sizes)
    assert told[-1][0] == told[-1][1]
    assert [result.texts for result in found] == [result.texts for result in whole]
    for one, other in zip(found, whole, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-5)
        assert one.description["tokens_forwarded"] == other.description["tokens_forwarded"]


def test_memory_for_not_even_one_sequence_is_an_error(data: Path) -> None:
    decoder = tiny_decoder()

    def crowded(_module: Any, _args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder.model.register_forward_pre_hook(crowded)
    for task in ("gsm8k_nll", "gsm8k_cot:6", "arc_challenge"):
        with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
            evaluate(decoder, [task], data_dir=data, max_new_tokens=5)


def test_without_memory_an_error_says_what_takes_less(
    run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowded(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("causalprune.runs.single.prune", crowded)
    code, _, err = run("prune", model, "-o", tmp_path / "out", "-n", "3", "--data-dir", data)
    assert code == 1
    assert "2.00 GiB" in err
    assert "--batch-tokens" in err
    assert "from files a smaller --cache-gib" in err
    assert "unexpected" not in err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_the_most_memory_is_that_of_this_process_and_not_of_the_one_that_started_it() -> None:
    held = np.ones(2**30, np.uint8)  # a gibibyte here
    code = "from causalprune.core.provenance import peak_bytes; print(peak_bytes()['process'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(held) < peak_bytes()["process"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_leaves_less_than_its_machine_has(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, member = tmp_path / "groups", tmp_path / "member"
    member.write_text("4:cpu,memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    monkeypatch.setattr(memory, "MEMBER", member)
    monkeypatch.setattr(memory, "GROUPS", groups)
    assert memory.free_bytes(torch.device("cpu")) > 2000  # nothing says anything
    root = groups / "memory" if version == 1 else groups
    most, used = memory.BEFORE if version == 1 else ("memory.max", "memory.current")
    for folder, limit, taken in ((root / "outer" / "inner", "max", 900), (root / "outer", 1500, 1000)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / most).write_text(f"{limit}\n")
        (folder / used).write_text(f"{taken}\n")
        (folder / "memory.stat").write_text("anon 700\ninactive_file 300\n")
    assert memory.free_bytes(torch.device("cpu")) == 1500 - 1000 + 300
