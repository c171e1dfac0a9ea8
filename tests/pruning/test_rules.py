"""How far weights move: known answers, bounds that hold, and roundings that are right in the mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalprune.pruning.rules import MOST, RULES, adam, factored, stored

EVERY = torch.ones(6, 8)


@pytest.mark.parametrize("name", RULES)
def test_what_is_not_kept_does_not_move(name: str) -> None:
    keep = (torch.rand(6, 8) > 0.5).float()
    known: dict[str, torch.Tensor] = {}
    for number in range(1, 5):
        move = RULES[name](known, torch.randn(6, 8) * keep, keep, number)
        assert torch.equal(move != 0, keep.bool())


def test_slopes_whose_squares_are_a_product_give_their_signs() -> None:
    """So the factors say all, and each slope over its own root mean square is one."""
    slope = torch.outer(torch.rand(6) + 0.1, torch.rand(8) + 0.1) * torch.randn(6, 8).sign()
    torch.testing.assert_close(factored({}, slope, EVERY, 1), slope.sign())


def test_known_and_new_slopes_are_weighed_as_published() -> None:
    known: dict[str, torch.Tensor] = {}
    for number, size in ((1, 1.0), (2, 3.0)):
        move = factored(known, torch.full((6, 8), size), EVERY, number)
    decay = 1 - 2**-0.8
    squares = decay * 1 + (1 - decay) * 9
    assert known["rows"] == pytest.approx(squares)
    torch.testing.assert_close(move, torch.full((6, 8), min(3 / squares**0.5, MOST)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-20, 1e10))
def test_no_direction_is_longer_than_it_may_be(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = (torch.rand(6, 8, generator=generator) > 0.3).float()
    slope = torch.randn(6, 8, generator=generator) * keep * size
    known: dict[str, torch.Tensor] = {}
    for number in (1, 2, 3):
        move = factored(known, slope * number**3, keep, number)
        assert bool(move.isfinite().all())
        assert float((move.square().sum() / keep.sum()).sqrt()) <= MOST * 1.001


def test_rows_columns_and_matrices_of_which_nothing_stays_do_not_count() -> None:
    keep = torch.ones(6, 8)
    keep[2], keep[:, 5] = 0, 0
    slope = torch.randn(6, 8) * 10
    found = factored({}, slope * keep, keep, 1)
    left = [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 6, 7]
    expected = factored({}, slope[left[0]][:, left[1]].clone(), torch.ones(5, 7), 1)
    torch.testing.assert_close(found[left[0]][:, left[1]], expected)
    assert not factored({}, torch.zeros(6, 8), torch.zeros(6, 8), 1).any()


def test_adam_is_torchs() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 8))
    other, known = weight.detach().clone(), dict[str, torch.Tensor]()
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.95))
    for number in range(1, 6):
        weight.grad = torch.randn(6, 8)
        other -= 0.1 * adam(known, weight.grad, EVERY, number)
        optimizer.step()
    torch.testing.assert_close(other, weight.detach())


def test_roundings_are_right_in_the_mean_and_the_same_for_a_seed() -> None:
    weight = torch.full((100, 100), 1 + 2**-10)  # bfloat16 has 1 and 1 + 2^-7
    found = [stored(weight.clone(), EVERY.new_ones(weight.shape), torch.bfloat16, seed) for seed in (0, 0, 1)]
    assert set(found[0].unique().tolist()) == {1, 1 + 2**-7}
    assert float(found[0].mean()) == pytest.approx(1 + 2**-10, abs=2e-4)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(stored(weight.clone(), EVERY.new_ones(weight.shape), torch.float32, 0), weight)


def test_what_a_type_can_hold_stays_and_no_kept_weight_becomes_zero() -> None:
    weight = torch.randn(50, 50).bfloat16().float()
    weight[0] = 0
    keep = (weight != 0).float()
    assert torch.equal(stored(weight.clone(), keep, torch.bfloat16, 0), weight)
    for dtype in (torch.float32, torch.bfloat16):
        tiny = stored(torch.zeros(2, 2), torch.eye(2), dtype, 0).to(dtype)
        assert (tiny != 0).tolist() == [[True, False], [False, True]]
