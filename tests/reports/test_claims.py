"""What a report says is no more than was measured: undefined is not worse, habits are no answers, chance decides nothing."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from test_judging import ANSWERS, LOSS, TEXT, judged, result

import causalprune as cp
from causalprune.core.types import EvalResult
from causalprune.reports.frontiers import found, frontier_page
from causalprune.reports.judging import Verdict
from causalprune.reports.summary import verdict


def beside(dense: EvalResult, pruned: EvalResult) -> Verdict:
    rows = [
        {"label": name, "criterion": name, "scope": "row", "sparsity": share, "results": [asdict(own)]}
        for name, share, own in (("dense", 0.0, dense), ("wanda", 0.5, pruned))
    ]
    return verdict({"calibration": {"sources": {}}, "rows": rows})


def test_what_cannot_be_compared_is_not_called_worse() -> None:
    one = EvalResult("a_nll", "nats_per_token", (1.0,), (1.0,), ("x",))
    found = beside(one, replace(one, values=(0.9,)))
    assert "worse than the dense one somewhere" not in found.headline
    assert any("Not to be compared with the dense model on a_nll" in reason for reason in found.reasons)
    broken = beside(result(TEXT, 0.0), replace(result(TEXT, 0.0), values=(float("inf"),) * 32))
    assert "worse" in broken.headline
    assert not broken.holds


def test_a_green_headline_says_what_it_leaves_open() -> None:
    found = judged({"causal-0.5": {ANSWERS: -0.05, TEXT: 0.0, LOSS: 0.0}})
    assert found.holds
    assert f"{ANSWERS} may still be worse by 0." in found.headline


def test_habits_of_writing_are_no_answers() -> None:
    loops = EvalResult("wikitext2_loops", "loops", (0.0,) * 32, (1.0,) * 32, tuple(map(str, range(32))))
    found = beside(loops, loops)
    assert not found.holds
    assert "answers not measured" in found.headline


def test_a_run_that_is_at_chance_says_so() -> None:
    about = {"chance": 0.5}
    values = tuple(float(i % 2) for i in range(32))
    own = EvalResult(
        "strategyqa", "accuracy", values, (1.0,) * 32, tuple(map(str, range(32))), description=about
    )
    found = beside(own, own)
    assert "nothing that was measured can decide" in found.headline
    assert "at chance" in found.reasons[0]


@pytest.mark.parametrize(
    ("metric", "unit"), [("diversity", "product of shares of distinct n-grams"), ("politeness", "politeness")]
)
def test_measures_of_any_name_are_compared(metric: Any, unit: str) -> None:
    own = EvalResult("own_texts", metric, (1.0, 0.5, 0.2), (1.0,) * 3, ("a", "b", "c"))
    assert cp.compare(dense=[own], pruned=[own]).columns == (f"own_texts, {unit}",)


def test_a_page_of_files_has_units_and_no_numbers_that_are_none(tmp_path: Any) -> None:
    point = {
        "name": "q8_0",
        "share": 0.0,
        "mix": "q8_0",
        "bytes": 10**6,
        "predicted_rise": None,
        "measured_rise": 0.1,
    }
    interval = {"difference": 2.0, "low": 1.0, "high": 3.0}
    record = {
        "model": "m", "on": "wikitext2_ppl", "metric": "perplexity", "limit": {"said": "of at most 1 MB"},
        "chosen": point | {"minus_dense": interval, "kept": 0.9}, "file": {"bytes": 10**6}, "best_whole": "q8_0",
        "dense": {"value": 20.0, "problems": 10}, "minus_best_whole": interval, "pays_below_bytes": None,
        "points": [point, point | {"name": "0.1-q4_0", "share": 0.1, "measured_rise": None, "predicted_rise": 0.2}],
    }  # fmt: skip
    said = " ".join(found(record))
    assert "nats" not in said
    assert "perplexity" in said
    page = frontier_page(record, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "not a number" not in page
    assert "its logarithm" in page
