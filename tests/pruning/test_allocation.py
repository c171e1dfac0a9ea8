"""Exactly as many weights go as were asked for, the lowest first, ties by position."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lowest_go
from torch import Tensor

from causalprune.core.errors import OptionError
from causalprune.pruning.allocation import (
    dense_shares,
    find_threshold,
    graded_shares,
    keep_above,
    keep_matrix,
    keep_n_of_m,
    keep_rows,
    prune_counts,
    spread,
)

TINY, NORMAL, HUGE = 1e-45, 1.1754944e-38, 3.4028235e38  # smallest subnormal and normal, largest float32
AWKWARD = [0.0, -0.0, TINY, 2 * TINY, NORMAL - TINY, NORMAL, 1.0, 1.0000001, 2.0, 65504.0, HUGE, float("inf")]
score_values = st.sampled_from(AWKWARD) | st.floats(0, width=32)
sparsities = st.floats(0, 1, exclude_min=True, exclude_max=True)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def matrices(draw: st.DrawFn, most: int = 4) -> list[Tensor]:
    """Return a few small matrices, some seen through a transposition as Conv1D weights are."""
    values, dtype = st.sampled_from(draw(st.lists(score_values, min_size=1, max_size=5))), draw(dtypes)
    found = []
    for _ in range(draw(st.integers(1, most))):
        out, into = draw(st.integers(1, 5)), draw(st.integers(1, 6))
        flat = draw(st.lists(values, min_size=out * into, max_size=out * into))
        matrix = torch.tensor(flat, dtype=torch.float32).to(dtype).view(out, into)
        found.append(matrix.T.contiguous().T if draw(st.booleans()) else matrix)
    return found


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=30), sparsities)
def test_every_prefix_has_the_sparsity_to_the_single_weight(sizes: list[int], sparsity: float) -> None:
    counts = prune_counts(sizes, sparsity)
    weights = pruned = 0
    for size, count in zip(sizes, counts, strict=True):
        assert 0 <= count <= size
        weights, pruned = weights + size, pruned + count
        assert abs(pruned - Fraction(sparsity) * weights) <= Fraction(1, 2) + Fraction(1, 1 << 30)


@pytest.mark.parametrize(
    ("sizes", "sparsity", "counts"),
    [
        ([3, 3, 3, 3], 0.5, [2, 1, 2, 1]),
        ([10], 0.25, [3]),  # a half rounds up
        ([1] * 7, 0.2, [0, 0, 1, 0, 0, 0, 0]),
        ([1, 0, 1], 0.999, [1, 0, 1]),
        ([7_000_000_000, 3], 0.1, [700_000_000, 0]),
        ([5, 5], 1e-9, [0, 0]),
    ],
)
def test_counts_by_hand(sizes: list[int], sparsity: float, counts: list[int]) -> None:
    assert prune_counts(sizes, sparsity) == counts


@settings(deadline=None)
@given(st.integers(0, 1 << 40), st.integers(1, 300))
def test_spread_is_even_and_complete(count: int, n_rows: int) -> None:
    rows = spread(count, n_rows).tolist()
    assert len(rows) == n_rows
    assert sum(rows) == count
    assert max(rows) - min(rows) <= 1


@pytest.mark.thorough
@settings(max_examples=200, deadline=None)
@given(st.data(), matrices())
def test_a_threshold_over_many_matrices_is_a_stable_sort_of_them_all(
    data: st.DataObject, scores: list[Tensor]
) -> None:
    total = sum(score.numel() for score in scores)
    count = data.draw(st.integers(0, total) | st.sampled_from([0, total]))
    threshold = find_threshold(lambda: iter(scores), count)
    for score, expected in zip(scores, lowest_go(scores, count), strict=True):
        keep, threshold = keep_above(score, threshold)
        np.testing.assert_array_equal(keep.numpy(), expected)
    assert threshold.ties == 0


@settings(max_examples=60, deadline=None)
@given(st.data(), matrices(most=1))
def test_one_matrix_is_a_stable_sort(data: st.DataObject, scores: list[Tensor]) -> None:
    count = data.draw(st.integers(0, scores[0].numel()))
    np.testing.assert_array_equal(keep_matrix(scores[0], count).numpy(), lowest_go(scores, count)[0])


@settings(max_examples=60, deadline=None)
@given(st.data(), matrices(most=1))
def test_rows_are_stable_sorts_of_their_own(data: st.DataObject, scores: list[Tensor]) -> None:
    out, into = scores[0].shape
    counts = data.draw(st.lists(st.integers(0, into), min_size=out, max_size=out))
    keep = keep_rows(scores[0], torch.tensor(counts))
    for row, count in enumerate(counts):
        np.testing.assert_array_equal(keep[row].numpy(), lowest_go([scores[0][row]], count)[0])


def test_neighbouring_floats_are_told_apart_across_a_large_pool() -> None:
    start = torch.tensor(1.0).view(torch.int32)
    neighbours = (start + torch.randperm(70_000, generator=torch.Generator().manual_seed(0))).int()
    scores = list(neighbours.view(torch.float32).view(7, 100, 100))  # spans a border of the coarse histogram
    for count in (1, 4464, 65_535, 65_536, 65_537, 69_999, 70_000):
        threshold = find_threshold(lambda: scores, count)
        for score, expected in zip(scores, lowest_go(scores, count), strict=True):
            keep, threshold = keep_above(score, threshold)
            np.testing.assert_array_equal(keep.numpy(), expected)


def test_ties_go_by_position_by_hand() -> None:
    score = torch.tensor([[1.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
    assert keep_matrix(score, 4).tolist() == [[False, False, False], [True, True, False]]
    assert keep_rows(score, torch.tensor([2, 1])).tolist() == [[False, False, True], [True, True, False]]


@pytest.mark.parametrize("bad", [-1.0, -TINY, float("-inf"), float("nan")])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_what_is_no_score_is_refused(bad: float, count: int) -> None:
    score = torch.tensor([[1.0, 2.0], [bad, 3.0]])
    with pytest.raises(ValueError, match="≥ 0"):
        keep_matrix(score, count)
    with pytest.raises(ValueError, match="≥ 0"):
        keep_rows(score, torch.tensor([0, 0]))
    if count:
        with pytest.raises(ValueError, match="≥ 0"):
            find_threshold(lambda: [score], count)


DOSES = (0.3, 0.5, 0.7)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(1e-6, 2), st.floats(1.1, 30), st.integers(1, 1000)), min_size=1, max_size=12)
)
def test_graded_shares_meet_the_sparsity_within_the_doses(groups: list[tuple[float, float, int]]) -> None:
    nats = torch.tensor([[first, first * rate, first * rate**2] for first, rate, _ in groups])
    sizes = [size for *_, size in groups]
    shares = graded_shares(nats, DOSES, sizes, 0.5)
    assert float(shares.min()) >= 0.3 - 1e-9
    assert float(shares.max()) <= 0.7 + 1e-9
    assert float(shares @ torch.tensor(sizes, dtype=torch.float64)) == pytest.approx(0.5 * sum(sizes))


def test_graded_shares_are_the_best_of_all() -> None:
    """Two groups of one size: all ways to share are tried, on curves that are worked out here."""
    nats = torch.tensor([[0.01, 0.02, 0.04], [0.01, 0.08, 0.64]])
    steps = torch.linspace(0.3, 0.7, 401, dtype=torch.float64)
    curves = [0.01 * torch.tensor(rate) ** ((steps - 0.3) / 0.2) for rate in (2.0, 8.0)]
    best = steps[(curves[0] + curves[1].flip(0)).argmin()]
    shares = graded_shares(nats, DOSES, [10, 10], 0.5)
    assert shares.tolist() == pytest.approx([float(best), 1 - float(best)], abs=0.01)


def test_groups_that_answer_alike_share_alike() -> None:
    nats = torch.tensor([[0.01, 0.03, 0.2]]).expand(4, 3)
    assert graded_shares(nats, DOSES, [50] * 4, 0.5).tolist() == pytest.approx([0.5] * 4, abs=0.003)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 60)), min_size=1, max_size=7),
    st.floats(0.01, 0.49),
    st.sampled_from([1, 576]),
)
def test_what_stays_dense_is_worth_the_most_of_all_choices(
    groups: list[tuple[float, int]], sparsity: float, times: int
) -> None:
    nats, sizes = torch.tensor([n for n, _ in groups], dtype=torch.float64), [times * s for _, s in groups]
    shares = dense_shares(nats, sizes, 0.5, sparsity)
    assert set(shares) <= {0.0, 0.5}

    def zeros(own: Sequence[float]) -> float:
        return sum(share * size for share, size in zip(own, sizes, strict=True))

    def cost(own: Sequence[float]) -> float:
        return sum(n for share, n in zip(own, nats.tolist(), strict=True) if share)

    choices = [own for own in product((0.0, 0.5), repeat=len(sizes)) if zeros(own) >= sparsity * sum(sizes)]
    assert zeros(shares) >= sparsity * sum(sizes) - 1e-6
    assert cost(shares) == pytest.approx(min(map(cost, choices)), abs=1e-9)


def test_sizes_without_a_common_divisor_stay_within_the_room() -> None:
    sizes = [1_000_003 + 2 * i for i in range(30)]
    shares = dense_shares(torch.rand(30, generator=torch.Generator().manual_seed(0)), sizes, 0.5, 0.3)
    zeros = sum(share * size for share, size in zip(shares, sizes, strict=True))
    assert 0.3 * sum(sizes) <= zeros <= 0.3 * sum(sizes) + max(sizes)


def test_a_count_for_each_share() -> None:
    assert prune_counts([10, 10, 10], [0.2, 0.55, 0.75]) == [2, 6, 7]
    assert sum(prune_counts([7] * 9, [0.31] * 9)) == 20


def test_inputs_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(OptionError, match="2:4 needs a multiple of 4 inputs, and a matrix has 6"):
        keep_n_of_m(torch.ones(3, 6), 2, 4)
