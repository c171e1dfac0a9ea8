"""Scores become factors between 1 and 10, and each weight gets the factor of its head."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalprune.core.anatomy import Role
from causalprune.pruning.importance import head_importance, weight_factor

deltas = st.lists(st.floats(-100, 100), min_size=1, max_size=40).map(
    lambda d: torch.tensor(d, dtype=torch.float64)
)


@pytest.mark.parametrize(
    ("delta", "importance"),
    [
        ([0.0, 1.0, 2.0], [1.0, 5.5, 10.0]),
        ([3.0, -1.0, 0.0], [10.0, 1.0, 3.25]),  # a head whose removal helps is the least important
        ([-0.25, -0.75], [10.0, 1.0]),
        ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0]),
        ([-2.0], [1.0]),
        ([0.0, 5e-324], [1.0, 10.0]),
    ],
)
def test_importance_by_hand(delta: list[float], importance: list[float]) -> None:
    assert head_importance(torch.tensor(delta, dtype=torch.float64)).tolist() == importance


@settings(deadline=None)
@given(deltas)
def test_importance_spans_1_to_10_linearly(delta: torch.Tensor) -> None:
    importance = head_importance(delta)
    low, high = float(delta.min()), float(delta.max())
    if low == high:
        assert importance.tolist() == [1.0] * len(delta)
        return
    assert importance[delta.argmin()] == 1
    assert importance[delta.argmax()] == 10
    for value, mapped in zip(delta.tolist(), importance.tolist(), strict=True):
        assert math.isclose((mapped - 1) / 9, (value - low) / (high - low), abs_tol=1e-12)


@settings(deadline=None)
@given(deltas, st.sampled_from([0.5, 2.0, 1024.0]))
def test_importance_knows_no_unit(delta: torch.Tensor, scale: float) -> None:
    torch.testing.assert_close(head_importance(delta * scale), head_importance(delta))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 head scores"):
        head_importance(torch.tensor([0.0, bad, 1.0]))


def test_factors_by_hand_with_grouped_queries() -> None:
    importance = torch.tensor([1.0, 2.0, 4.0, 10.0])  # heads 0, 1 share key-value head 0; heads 2, 3 head 1

    def factor(role: Role) -> torch.Tensor:
        shape = {"o": (5, 12), "q": (12, 5)}.get(role, (6, 5))
        return weight_factor(importance, role, shape, {"q": 4, "o": 4, "k": 2, "v": 2}.get(role, 0))

    per_head = [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [10.0] * 3
    assert factor("q").tolist() == [[f] for f in per_head]
    assert factor("o").tolist() == [per_head]
    assert factor("k").tolist() == factor("v").tolist() == [[1.5]] * 3 + [[7.0]] * 3
    for role in ("gate", "up", "down"):
        assert factor(role).tolist() == [[4.25]]


@pytest.mark.parametrize(("n_kv_heads", "shared"), [(1, [3.0, 3.0, 3.0, 3.0]), (4, [1.0, 2.0, 3.0, 6.0])])
def test_key_value_heads_from_one_to_all(n_kv_heads: int, shared: list[float]) -> None:
    factor = weight_factor(torch.tensor([1.0, 2.0, 3.0, 6.0]), "k", (n_kv_heads, 7), n_kv_heads)
    assert factor[:, 0].tolist() == shared[:n_kv_heads]
