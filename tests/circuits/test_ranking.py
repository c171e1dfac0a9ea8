"""Orders, curves and tests of hypotheses, from numbers alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalprune.circuits.curves import areas, curve, faithfulness
from causalprune.circuits.hypotheses import better_than, equivalence, independence, minimality
from causalprune.circuits.ranking import (
    Round,
    by_chance,
    cost_of,
    mean_jaccard,
    membership,
    order_of,
    over_chance,
    prefix,
    resampled_orders,
    stability,
    values_of,
    with_ties,
)


def rounds(n: int = 12, problems: int = 30, noise: float = 0.01) -> list[Round]:
    generator = torch.Generator().manual_seed(1)
    first = torch.arange(n, 0, -1).double()[:, None] + noise * torch.randn(
        n, problems, generator=generator, dtype=torch.float64
    )
    second = first.clone()
    second[6:] = math.nan
    second[:6] = 2 * second[:6].flip(0)
    return [Round(first, 6), Round(second, 0)]


def test_all_rounds_order_what_goes_on() -> None:
    """Six units go on; what they are worth is the mean of both rounds, and those that are out come after them."""
    own = rounds()  # 14, 16, 18, 20, 22, 24 in the second, beside 12, 11, 10, 9, 8, 7
    assert values_of(own, "signed").tolist() == pytest.approx(
        [13, 13.5, 14, 14.5, 15, 15.5, 6, 5, 4, 3, 2, 1], abs=0.02
    )
    assert order_of(own, "signed").tolist() == [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 10, 11]
    own[1].scores[:6] /= 8
    assert order_of(own, "signed").tolist() == list(range(12))
    signs = rounds()
    flipped = [Round(-own.scores, own.kept) for own in signs]
    assert order_of(flipped, "absolute").tolist() == order_of(signs, "absolute").tolist()
    assert order_of(flipped[:1], "signed").tolist() == list(range(12))[::-1]


def test_units_of_several_sizes_are_ranked_by_what_they_are_worth_for_their_cost() -> None:
    scores = torch.tensor([[9.0], [4.0], [3.0]], dtype=torch.float64).expand(3, 8)
    sizes = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64)
    assert cost_of(torch.full((3,), 7.0)).tolist() == [1.0, 1.0, 1.0]
    assert (cost_of(sizes) / cost_of(sizes)[1]).tolist() == pytest.approx([4.0, 1.0, 1.0])
    for cost, order in ((None, [0, 1, 2]), (cost_of(sizes), [1, 2, 0])):
        own = [Round(scores, 0, cost=cost)]
        assert order_of(own, "absolute").tolist() == order
        assert all(one.tolist() == order for one in resampled_orders(own, "absolute"))


def test_draws_give_the_same_order_where_nothing_is_uncertain() -> None:
    orders = resampled_orders(rounds(noise=1e-6), "absolute")
    assert all(order.tolist() == order_of(rounds(), "absolute").tolist() for order in orders)
    found = membership(orders, torch.ones(12, dtype=torch.float64), 4 / 12)
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, *[0.0] * 6]
    assert all(own["over_chance"] == pytest.approx(1.0) for own in stability(orders).values())


def test_draws_of_several_sizes_have_the_same_share_and_not_as_many_units() -> None:
    """Half of the weights are the first of the two large units with four small ones, or all small ones with one large."""
    sizes = torch.tensor([*[1.0] * 8, 50.0, 50.0], dtype=torch.float64)
    orders = [torch.tensor([8, *range(8), 9]).int(), torch.tensor([*range(8), 8, 9]).int()]
    assert membership(orders, sizes, 0.5).tolist() == [1.0] * 4 + [0.5] * 4 + [1.0, 0.0]
    found = stability(orders, sizes)
    for share, one, other in (("0.5", 5, 9), ("0.2", 1, 9)):
        chance = by_chance(one / 10, other / 10)
        assert found[share]["jaccard"] == one / other
        assert found[share]["over_chance"] == pytest.approx((one / other - chance) / (1 - chance))


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.1, 1e6))
def test_where_units_are_of_one_size_shares_are_counts(n: int, size: float) -> None:
    noise = torch.randn(n, 9, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    orders, sizes = (
        resampled_orders([Round(noise, 0)], "absolute")[:5],
        torch.full((n,), size, dtype=torch.float64),
    )
    assert stability(orders, sizes) == stability(orders)
    for count in range(1, n + 1):
        hits = torch.stack([torch.isin(torch.arange(n), order[:count]) for order in orders]).double()
        assert torch.equal(membership(orders, sizes, count / n), hits.sum(0) / 5)


def test_chance_is_taken_off() -> None:
    """Random sets of a share K have the similarity K / (2 − K) on average, which becomes zero."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(400, generator=generator) for _ in range(60)]
    for share in (0.1, 0.2, 0.5):
        own, chance = mean_jaccard(orders, [int(400 * share)] * 60)
        assert own == pytest.approx(share / (2 - share), rel=0.05)
        assert chance == by_chance(share, share) == pytest.approx(share / (2 - share))
        assert over_chance(own, chance) == pytest.approx(0.0, abs=0.02)
    counts = [40 + 5 * (draw % 60) for draw in range(60)]  # sets of several counts are random too
    assert over_chance(*mean_jaccard(orders, counts)) == pytest.approx(0.0, abs=0.02)
    assert over_chance(0.3, by_chance(0.2, 0.4)) == pytest.approx((0.3 - 0.08 / 0.52) / (1 - 0.08 / 0.52))
    assert over_chance(1.0, by_chance(1.0, 1.0)) == 1.0


def test_noise_alone_is_not_stable() -> None:
    noise = torch.randn(100, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = stability(resampled_orders([Round(noise, 0)], "absolute"))
    assert all(value["over_chance"] < 0.6 for value in own.values())


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.floats(0.001, 1.0))
def test_a_prefix_is_the_smallest_that_reaches_a_share(sizes: list[float], share: float) -> None:
    own, order = torch.tensor(sizes, dtype=torch.float64), torch.arange(len(sizes))
    count = prefix(order, own, share)
    assert count >= 1
    assert float(own[:count].sum()) >= share * float(own.sum()) * (1 - 1e-9)
    assert count == 1 or float(own[: count - 1].sum()) < share * float(own.sum())


def test_ties_are_members_together() -> None:
    values = torch.tensor([5.0, 3.0, 3.0 - 1e-6, 1.0, 0.0, 0.0])
    order = torch.arange(6)
    assert [with_ties(order, values, count) for count in (1, 2, 3, 4, 5)] == [1, 3, 3, 4, 5]
    assert (
        with_ties(order, torch.tensor([1.0, 0.5, 4.0, 4.0, 3.0, 2.0]), 2) == 2
    )  # another round begins there
    assert with_ties(order, torch.full((6,), 2.0), 3) == 3  # all tie: a choice by chance, but short of all


def test_a_curve_by_hand() -> None:
    intact, empty = torch.full((10,), 1.0).double(), torch.full((10,), 3.0).double()
    nats = torch.stack([empty, (intact + empty) / 2, intact])
    sizes = [(0.1, 1, 10), (0.5, 5, 50), (1.0, 10, 100)]
    found = curve(sizes, nats, nats * 0, {"intact": intact, "empty": empty}, 100)
    assert [point.faithfulness.value for point in found.points] == [0.0, 0.5, 1.0]
    assert [point.nats.value for point in found.points] == [2.0, 1.0, 0.0]
    assert found.cpr.value == pytest.approx(0.4 * 0.25 + 0.5 * 0.75)
    assert found.cmd.value == pytest.approx(0.4 * 0.75 + 0.5 * 0.25)
    assert found.empty.value == 2.0
    assert found.guessing == math.log(100)


def test_intervals_are_paired() -> None:
    """What problems share cancels: f does not depend on how hard they are."""
    hard = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 50
    intact, empty = hard + 1, hard + 3
    found = curve([(1.0, 1, 1)], (hard + 2)[None], hard[None], {"intact": intact, "empty": empty}, 10).points[
        0
    ]
    assert found.faithfulness.high - found.faithfulness.low < 1e-9
    assert found.nats.high - found.nats.low < 1e-9
    assert found.kl.high - found.kl.low > 1


def test_areas_are_trapezoids() -> None:
    cpr, cmd = areas([0.0, 0.5, 1.0], np.array([0.0, 2.0, 1.0]))
    assert (cpr, cmd) == (pytest.approx(0.5 + 0.75), pytest.approx(0.5 + 0.25))
    assert faithfulness(*(np.array([own]) for own in (1.5, 1.0, 3.0))).tolist() == [0.75]
    assert math.isnan(faithfulness(*(np.array([own]) for own in (1.0, 1.0, 1.0)))[0])


def test_better_than_nine_tenths() -> None:
    others = torch.arange(100).double()
    assert better_than(torch.tensor(200.0).double(), others)["p"] == pytest.approx(0.9**100)
    assert not better_than(torch.tensor(90.0).double(), others)["holds"]
    assert better_than(torch.tensor(98.5).double(), others)["holds"]


def test_equivalence_is_rejected_for_a_clear_difference_only() -> None:
    model = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    assert not equivalence(model, model + 1)["holds"]
    noise = torch.randn(100, generator=torch.Generator().manual_seed(5)).double() * 0.1
    assert equivalence(model, model + noise)["holds"]
    assert equivalence(model, model) == {"ahead": 0, "of": 0, "p": 1.0, "holds": True}
    assert equivalence(model, torch.where(torch.arange(len(model)) < 4, model + 1, model))["of"] == 4


def test_independence_sees_a_dependence_without_correlation() -> None:
    x = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    other = torch.randn(60, generator=torch.Generator().manual_seed(9)).double()
    assert independence(x, other)["holds"]
    assert not independence(x, x.square())["holds"]


def test_members_that_do_no_more_than_others_are_spare() -> None:
    added = torch.linspace(0, 1, 100).double()
    found = minimality(torch.tensor([5.0, 0.5, 4.0]).double(), added)
    assert found["spare"] == [1]
    assert not found["holds"]
    assert minimality(torch.tensor([5.0, 4.0]).double(), added)["holds"]
    for few in (0, 28):  # 0.9^28 = 0.052: nothing could be shown, whatever the members do
        found = minimality(torch.tensor([5.0]).double(), torch.zeros(few).double())
        assert (found["outside"], found["holds"], found["spare"]) == (few, False, [])
    assert minimality(torch.tensor([5.0]).double(), torch.zeros(29).double())["holds"]
