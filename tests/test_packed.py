"""Result files of the measuring programs: lists that rows share are there once, and come back bit for bit."""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from causalprune.core.types import EvalResult
from causalprune.evaluation.results import read_json, results_in

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import packed  # type: ignore[import-not-found, unused-ignore]

HASHES = tuple(f"{number:064x}"[::-1] for number in range(3))


def row(*values: float, task: str = "gsm8k_nll") -> dict[str, Any]:
    """Return a result as a measuring program has it, with problems that its file does without."""
    weights, texts = (1.0, 2.0, 3.0), ("a text",) * 3
    return asdict(EvalResult(task, "nats_per_token", values, weights, HASHES, prompts=texts, golds=texts))


def test_rows_come_back_and_share_their_lists(tmp_path: Path) -> None:
    rows = [row(0.1, math.nan, 1 / 3), row(0.2, 0.5, -0.0), row(1.0, 2.0, 3.0) | {"weights": (1, 2, 3)}]
    raw = {"table": {"rows": [{"label": "dense", "results": rows}]}, "other": row(0.0, 0.0, 0.0, task="arc")}
    path, light = tmp_path / "file.json", packed.light(raw)
    packed.write_dense(path, {"raw": packed.packed(light)})
    found = read_json(path)["raw"]
    assert list(found["shared"]["examples"]) == ["gsm8k_nll", "arc"]
    assert list(found["shared"]["weights"]) == ["gsm8k_nll", "gsm8k_nll 2", "arc"]  # 1 is not 1.0 in a file
    assert not list(packed.differences(light, packed.unpacked(found)))
    assert results_in([light["other"]])[0].examples == tuple(name[:12] for name in HASHES)
    assert path.read_text().count("\n") == 1


def test_a_lost_digit_is_found() -> None:
    before, after = ({"rows": [row(value, 0.0, 0.0)]} for value in (0.1, math.nextafter(0.1, 1)))
    assert list(packed.differences(packed.light(before), packed.light(after))) == ["/rows/0/values/0"]
    assert list(packed.differences({"a": 1}, {"a": 1.0, "b": 2})) in (
        ["/a", "/b is on one side only"],
        ["/b is on one side only", "/a"],
    )


def test_examples_that_short_hashes_cannot_tell_apart_are_refused() -> None:
    result = row(0.0, 0.0, 0.0) | {"examples": ("a" * 64, "a" * 63 + "b", "c" * 64)}
    with pytest.raises(SystemExit, match="same first 12 digits"):
        packed.light(result)
