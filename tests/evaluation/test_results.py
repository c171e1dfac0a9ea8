import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from causalprune.core.errors import CheckpointError, MismatchError
from causalprune.core.types import EvalResult
from causalprune.evaluation.results import (
    averaged,
    headline,
    interval,
    paired_difference,
    read_json,
    read_results,
    write_json,
    write_results,
)

Metric = Literal["accuracy", "acc_norm", "nats_per_token", "perplexity"]


def result(values: Any, weights: Any = None, metric: Metric = "accuracy") -> EvalResult:
    values = tuple(float(v) for v in values)
    weights = (1.0,) * len(values) if weights is None else tuple(float(w) for w in weights)
    return EvalResult("task", metric, values, weights, tuple(f"{i:x}" for i in range(len(values))))


def test_headline_is_a_ratio_of_sums() -> None:
    assert headline(result([1, 0, 1, 1])) == 0.75
    assert headline(result([3, 5], [1, 3], "nats_per_token")) == 2.0
    assert headline(result([3, 5], [1, 3], "perplexity")) == pytest.approx(math.exp(2))


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [("accuracy", "better"), ("acc_norm", "better"), ("nats_per_token", "worse"), ("perplexity", "worse")],
)
def test_verdict_follows_the_direction_of_the_metric(metric: Metric, verdict: str) -> None:
    values = np.random.default_rng(0).uniform(1, 2, 40)
    a, b = result(values + 0.5, metric=metric), result(values, metric=metric)
    found = paired_difference(a, b, resamples=500)
    assert found.verdict == verdict
    assert found.difference == pytest.approx(headline(a) - headline(b))
    assert 0 < found.low <= found.difference <= found.high
    opposite = {"better": "worse", "worse": "better"}[verdict]
    assert paired_difference(b, a, resamples=500).verdict == opposite


def test_pairing_removes_the_variation_between_examples() -> None:
    values = np.random.default_rng(0).normal(0, 10, 60)
    noise = np.random.default_rng(1).normal(0.3, 0.2, 60)
    a, b = (result(v, metric="nats_per_token") for v in (values + noise, values))
    assert paired_difference(a, b, resamples=500).verdict == "worse"
    alone = interval(a, resamples=500)
    assert alone.high - alone.low > 10 * (paired_difference(a, b, resamples=500).high - 0.3)


def test_equal_results_show_no_difference() -> None:
    found = paired_difference(result([0, 1, 1]), result([0, 1, 1]), resamples=100)
    assert (found.difference, found.verdict) == (0.0, "no difference shown")
    assert -found.low == found.high == pytest.approx(1 - 0.025 ** (1 / 3)), "what three have not shown"
    large = paired_difference(result([1] * 400), result([1] * 400), resamples=100)
    assert large.high == pytest.approx(0.0092, abs=1e-4)
    assert interval(result([0] * 50), resamples=100).high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert interval(result([1] * 50), resamples=100).low == pytest.approx(0.025 ** (1 / 50))


@pytest.mark.parametrize(
    ("changed", "n", "verdict"),
    [(5, 5, "no difference shown"), (6, 6, "worse"), (5, 100, "no difference shown"), (6, 100, "worse")],
)
def test_few_changes_are_no_evidence(changed: int, n: int, verdict: str) -> None:
    """As the sign test has it: five of five are 0.06, six of six 0.03."""
    found = paired_difference(result([0] * changed + [1] * (n - changed)), result([1] * n), resamples=2000)
    assert found.verdict == verdict
    assert -1 <= found.low <= found.difference <= found.high <= 1


def test_losses_of_other_tokens_are_not_compared() -> None:
    a, b = (result([5.0, 6.0], [n, n], "nats_per_token") for n in (5, 10))
    with pytest.raises(MismatchError, match="other numbers of tokens for both models"):
        paired_difference(a, b)


def test_means_over_draws_are_of_all_draws() -> None:
    draws = [
        replace(
            result([0, 1]),
            description={"answers": {"not_ended": share, "mean_tokens": tokens, "unended": [0]}},
        )
        for share, tokens in ((0.0, 10.0), (0.5, 30.0))
    ]
    assert averaged(draws).description["answers"] == {"not_ended": 0.25, "mean_tokens": 20.0}


def test_ratio_is_resampled_jointly() -> None:
    weights = np.random.default_rng(0).integers(1, 100, 30)
    found = interval(result(2.0 * weights, weights, "nats_per_token"), resamples=200)
    assert (found.low, found.value, found.high) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.thorough
@pytest.mark.parametrize("n", [8, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(n: int) -> None:
    random = np.random.default_rng(n)
    hits = 0
    for trial in range(400):
        weights = random.integers(5, 15, n)
        noise = random.normal(0.2, 1, n)
        a = result(weights * noise, weights, "nats_per_token")
        b = result(np.zeros(n), weights, "nats_per_token")
        found = paired_difference(a, b, resamples=400, seed=trial)
        hits += found.low <= 0.2 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_intervals_of_perplexity_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        found = interval(result(random.normal(2, 0.3, 20), metric="perplexity"), resamples=400, seed=trial)
        hits += found.low <= math.exp(2) <= found.high
    assert 0.91 <= hits / 300 <= 0.985


def test_same_seed_same_interval() -> None:
    a = result(np.random.default_rng(0).normal(size=50))
    assert interval(a, resamples=200) == interval(a, resamples=200)
    assert interval(a, resamples=200) != interval(a, resamples=200, seed=1)


def test_ten_thousand_resamples_of_a_benchmark_are_quick_and_close_to_theory() -> None:
    values = np.arange(1319) % 4 == 0
    found = interval(result(values))
    error = 1.96 * values.std() / math.sqrt(1319)
    assert (found.high - found.value, found.value - found.low) == pytest.approx((error, error), rel=0.06)


def test_different_examples_cannot_be_compared() -> None:
    a = result([1, 0])
    with pytest.raises(MismatchError, match=r"different examples .*2 and 2, 1 shared"):
        paired_difference(a, replace(a, examples=("0", "9")))
    with pytest.raises(MismatchError, match="different examples"):
        paired_difference(a, replace(a, examples=("1", "0")))
    with pytest.raises(MismatchError, match="cannot be compared"):
        paired_difference(a, replace(a, metric="acc_norm"))
    with pytest.raises(MismatchError, match="one of each per example"):
        headline(replace(a, weights=(1.0,)))


@pytest.mark.parametrize("values", [[1.0], [1.0, math.nan], [1.0, math.inf]])
def test_what_cannot_be_judged_is_undefined(values: list[float]) -> None:
    a = result(values, metric="nats_per_token")
    b = result([0.5] * len(values), metric="nats_per_token")
    assert paired_difference(a, b, resamples=50).verdict == "undefined"
    assert math.isnan(interval(a, resamples=50).low)


def test_perplexity_may_overflow_without_a_warning() -> None:
    assert headline(result([1e6], metric="perplexity")) == math.inf


def test_round_trip_is_exact(tmp_path: Path) -> None:
    first = result([0.1 + 0.2, 1e-300, math.inf, -0.0], [1 / 3, 2, 3, 4], "nats_per_token")
    first = replace(
        first,
        texts=("ä\n", "", "\u2028", "x"),
        seconds=1.5,
        description={"a": [1, None], "b": {"float": "1"}},
    )
    second = replace(result([1]), description={"worst": -math.inf})
    path = tmp_path / "new" / "results.json"
    write_results(path, [first, second], {"command": "x"})
    assert read_results(path) == [first, second]
    assert read_json(path)["description"] == {"command": "x"}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_nan_survives_in_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_results(path, [result([math.nan, 1])])
    assert "NaN" not in path.read_text()
    values = read_results(path)[0].values
    assert math.isnan(values[0])
    assert values[1] == 1


def test_other_versions_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"version": 99})
    with pytest.raises(CheckpointError, match="version 99"):
        read_json(path)
    for text in ("[1]", '{"results": []', '{"results": []}'):
        path.write_text(text)
        with pytest.raises(CheckpointError):
            read_results(path)
    path.write_text('{"version": 1, "results": {"task": "t"}}')
    with pytest.raises(CheckpointError, match="holds no results"):
        read_results(path)
    path.write_text('{"version": 1, "results": [{"task": "t"}]}')
    with pytest.raises(CheckpointError, match="malformed"):
        read_results(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_results(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CheckpointError, match="disk full"):
        write_json(path, {"a": 2})
    assert read_json(path)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_resampled_values_are_those_of_drawing_examples_one_by_one() -> None:
    from causalprune.evaluation.results import resampled

    own = result([0.5, 1.5, 4.0], metric="perplexity")
    picks = np.random.default_rng(3).integers(0, 3, size=(50, 3))
    expected = np.exp(np.array(own.values)[picks].sum(1) / np.array(own.weights)[picks].sum(1))
    assert resampled(own, resamples=50, seed=3) == pytest.approx(expected)


@pytest.mark.parametrize("key", ["chat_template", "generation", "window", "task_version"])
def test_different_settings_cannot_be_compared(key: str) -> None:
    one, other = (replace(result([1.0, 2.0]), description={key: value}) for value in ("this", "that"))
    with pytest.raises(MismatchError, match=f"{key} is 'this' and 'that'"):
        paired_difference(one, other)
