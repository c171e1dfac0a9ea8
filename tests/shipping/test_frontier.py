"""What is tried and chosen: limits as they are typed, the frontier of points, halves of problems."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from causalprune.core.errors import OptionError
from causalprune.core.types import EvalResult
from causalprune.reports.frontiers import found, frontier_page
from causalprune.shipping.frontier import (
    NEAR,
    Limit,
    Point,
    best,
    can_keep,
    front,
    half,
    kept,
    limit_of,
    pays_below,
    worse,
    worth_measuring,
)


def nats(*values: float) -> EvalResult:
    names = tuple(str(i) for i in range(len(values)))
    return EvalResult("x_nll", "nats_per_token", values, (1.0,) * len(values), names)


def solved(*values: float) -> EvalResult:
    names = tuple(str(i) for i in range(len(values)))
    return EvalResult("x_answers", "accuracy", values, (1.0,) * len(values), names)


WHOLE = [Point(0, "q8_0", 100), Point(0, "q4_k_m", 60), Point(0, "q2_k", 40)]
RISES = {"q8_0": 0.0, "q4_k_m": 0.1, "q2_k": 0.9}


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (("400MB", None, None), Limit("size", 4e8)),
        (("1.5 gb", None, None), Limit("size", 1.5e9)),
        ((None, "1.5x", None), Limit("speed", 1.5)),
        ((None, None, 0.95), Limit("keep", 0.95)),
    ],
)
def test_limits_are_read(given: tuple[str | None, str | None, float | None], limit: Limit) -> None:
    assert limit_of(*given) == limit


@pytest.mark.parametrize(
    "given",
    [
        (None, None, None),
        ("400MB", "1.5x", None),
        ("400", None, None),
        ("0MB", None, None),
        ("400MiB", None, None),
        (None, "fast", None),
        (None, None, 1.5),
    ],
)
def test_what_is_no_limit_is_refused(given: tuple[str | None, str | None, float | None]) -> None:
    with pytest.raises(OptionError):
        limit_of(*given)


def test_halves_share_no_problem_and_lose_none() -> None:
    result = nats(1, 2, 3, 4, 5)
    parts = half(result, 0), half(result, 1)
    assert [part.values for part in parts] == [(1, 3, 5), (2, 4)]
    assert sorted(parts[0].examples + parts[1].examples) == sorted(result.examples)
    alike = replace(result, examples=("a", "a", "b", "c", "b"))
    assert [half(alike, which).values for which in (0, 1)] == [(1, 2, 4), (3, 5)]


def test_worse_and_kept_whatever_is_measured() -> None:
    assert worse(nats(2, 2), nats(1, 1)) == pytest.approx(1)
    assert kept(nats(2, 2), nats(1, 1)) == pytest.approx(math.exp(-1))
    assert [can_keep(own) for own in (nats(1, 2), solved(0, 1), solved(0, 0), solved(-1, 3))] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not can_keep(replace(nats(1, 2), metric="answer_length"))
    assert worse(solved(1, 0), solved(1, 1)) == pytest.approx(0.5)
    assert kept(solved(1, 0), solved(1, 1)) == pytest.approx(0.5)


def test_points_near_the_frontier_are_measured() -> None:
    near = Point(0.1, "q4_k_m", 50, predicted=0.1 + NEAR / 2)  # smaller than what is measured to be as good
    beaten = Point(0.1, "q8_0", 90, predicted=0.1 + 2 * NEAR)
    hopeless = Point(0.1, "q2_k", 60, predicted=5.0)
    assert worth_measuring([*WHOLE, near, beaten, hopeless], RISES) == [near]
    assert worth_measuring([*WHOLE, near], {**RISES, near.name: 0.2}) == []


def test_the_best_within_a_limit() -> None:
    keeps = {name: math.exp(-rise) for name, rise in RISES.items()}
    names = {
        str(limit): [p.name for p in best(WHOLE, RISES, limit, keeps)]
        for limit in (Limit("size", 70), Limit("size", 10), Limit("keep", 0.9), Limit("speed", 2))
    }
    assert [*names.values()] == [["q4_k_m", "q2_k"], [], ["q4_k_m", "q8_0"], ["q8_0", "q4_k_m", "q2_k"]]


def test_where_removing_starts_to_pay() -> None:
    points = [*WHOLE, Point(0.1, "q4_k_m", 55, 0.3), Point(0.1, "q8_0", 90, 0.3)]
    assert pays_below(points, {**RISES, "0.1-q4_k_m": 0.3, "0.1-q8_0": 0.3}) == 55
    assert pays_below(points, {**RISES, "0.1-q4_k_m": 1.0}) is None
    alone = Point(0.1, "q2_k", 1, 0.3)  # which no whole file is as small as
    assert pays_below([*WHOLE, alone], {**RISES, alone.name: 0.01}) is None


def test_what_nothing_is_both_as_small_and_better_than() -> None:
    beaten, same, unknown = (
        Point(0.1, "q8_0", 80, 0.3),
        Point(0.1, "q2_k", 40, 2.0),
        Point(0.2, "q2_k", 1, 0.0),
    )
    rises = {**RISES, beaten.name: RISES["q4_k_m"], same.name: RISES["q2_k"]}
    assert [p.name for p in front([*WHOLE, beaten, same, unknown], rises)] == ["q8_0", "q4_k_m", "q2_k"]


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    difference = {"difference": 0.1, "low": 0.0, "high": 0.2, "n": 5, "verdict": "worse"}
    row = {"name": "q4_k_m", "share": 0.0, "mix": "q4_k_m", "bytes": 60, "predicted_rise": None}
    row |= {"measured_rise": 0.1, "value": 1.1, "kept": 0.9, "minus_dense": difference}
    other = {
        "name": "0.1-q2_k",
        "share": 0.1,
        "mix": "q2_k",
        "bytes": 30,
        "predicted_rise": 0.5,
        "measured_rise": None,
    }
    record = {
        "model": "<model>",
        "on": "x_nll",
        "metric": "nats_per_token",
        "limit": {"said": "at most 70 MB"},
        "dense": {"value": 1.0, "problems": 5},
        "points": [row, other],
        "chosen": row,
        "best_whole": "q4_k_m",
        "minus_best_whole": None,
        "pays_below_bytes": None,
        "file": {"bytes": 60_000_000},
    }
    assert "Speed against" not in frontier_page(record, tmp_path / "slow.html").read_text(encoding="utf-8")
    record["speeds"] = {"q4_k_m": {"over_dense": 1.25, "tokens_per_second": 80.0}}
    text = frontier_page(record, tmp_path / "frontier.html").read_text(encoding="utf-8")
    assert "&lt;model&gt;" in text
    assert "<model>" not in text
    assert found(record)[0] == "quantise to q4_k_m and do not prune: 60.0 MB, at most 70 MB"
    assert found(record)[-1] == "speed: 1.25 × dense at Q8_0 in llama.cpp, 80.0 tokens/s"
    assert text.count("<svg") == 2
    assert text.count("<circle") == 2, (
        "the file that was timed stands in both drawings, what was predicted in one"
    )
    assert "<td>1.25 ×</td>" in text
    assert "0.1-q2_k" in text
    assert "<th>kept</th>" in text
    row["kept"], record["pays_below_bytes"] = None, 90_000_000
    assert not [line for line in found(record) if line.startswith("kept")]
    assert "at 90.0 MB, and at no larger size" in "".join(found(record))
    assert "<th>kept</th>" not in frontier_page(record, tmp_path / "frontier.html").read_text(
        encoding="utf-8"
    )
