"""From scores to an order of units, and how sure that is: pure functions of values per problem."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rank = Literal["absolute", "signed"]
RANKS: tuple[Rank, ...] = ("absolute", "signed")
Shares = TypeVar("Shares", float, Tensor)
DRAWS = 200
STABLE_SHARES = (0.1, 0.2, 0.5)
STABLE = 0.6
"""Mean Jaccard over draws, corrected for chance, below which a circuit is not stable."""
FEWEST = 8
"""Problems that a bootstrap needs."""
TIE = 1e-3
"""Units whose score is so near (as a share) to that of the last member belong to a circuit too: a choice would be by chance."""


@dataclass(frozen=True, eq=False)
class Round:
    """The scores of one round, NaN for units that are closed in it, and how many of them go on.

    After the last one units may have moved by `moves`, up as shares of the order. Units of several kinds are ranked by what they
    are worth for their `cost`.
    """

    scores: Float[Tensor, "unit problem"]
    kept: int
    moves: Float[Tensor, "unit"] | None = None
    cost: Float[Tensor, "unit"] | None = None

    def mean(self, counts: Float[Tensor, "problem"] | None = None) -> Float[Tensor, "unit"]:
        """Return the mean score of every unit, or a mean by `counts` of problems, for its cost."""
        own = self.scores.mean(1) if counts is None else self.scores @ counts
        return own if self.cost is None else own / self.cost


def cost_of(sizes: Float[Tensor, "unit"]) -> Float[Tensor, "unit"]:
    """Return what units of these sizes count as: the size over the mean, 1 where all are of one size.

    A circuit of a given size has room for many small units or a few large ones, and takes what is worth most for its size first.
    """
    return sizes / sizes.mean()


def order_of(rounds: Sequence[Round], rank: Rank) -> Int[Tensor, "unit"]:
    """Return the units from the first member to the last: what stayed longest, then by `values_of` its rounds."""
    return _ordered([own.mean() for own in rounds], rank, rounds)


def values_of(rounds: Sequence[Round], rank: Rank) -> Float[Tensor, "unit"]:
    """Return what units are ranked by: the mean over problems, or its size, as a mean over the rounds that each was in."""
    first, *others = _worths([own.mean() for own in rounds], rank)
    for own in others:
        first = torch.where(own.isneginf(), first, own)
    return first


def _worths(means: Sequence[Float[Tensor, "unit"]], rank: Rank) -> list[Float[Tensor, "unit"]]:
    """Return what units are worth after each round: the least there is for those that are out.

    All rounds count, as the last alone says what units are to a model of which most is missing.
    """
    sizes = torch.stack([(mean.abs() if rank == "absolute" else mean) for mean in means])
    counts = torch.arange(1, len(means) + 1, dtype=sizes.dtype)[:, None]
    return list((sizes.cumsum(0) / counts).nan_to_num(nan=-torch.inf))


def _ordered(
    means: Sequence[Float[Tensor, "unit"]], rank: Rank, rounds: Sequence[Round]
) -> Int[Tensor, "unit"]:
    """Order by rounds: who is among the first of a round goes on; who goes on without a score there is the last of it.

    Where units moved after that, by the places that they came to.
    """
    first, *others = _worths(means, rank)
    order = first.argsort(descending=True, stable=True)
    for own, before in zip(others, rounds, strict=False):
        front = order[: before.kept]
        order = torch.cat([front[own[front].argsort(descending=True, stable=True)], order[before.kept :]])
    if rounds[-1].moves is not None:
        order = (places(order) + rounds[-1].moves).argsort(descending=True, stable=True)
    return order


def places(order: Int[Tensor, "unit"]) -> Float[Tensor, "unit"]:
    """Return the place of every unit in an order: 1 for the first, falling evenly towards 0."""
    found = torch.empty(len(order), dtype=torch.float64)
    found[order] = 1 - torch.arange(len(order), dtype=torch.float64) / len(order)
    return found


def last_scores(rounds: Sequence[Round]) -> Float[Tensor, "unit problem"]:
    """Return the scores of each unit in the last round that it was in."""
    found = rounds[0].scores
    for own in rounds[1:]:
        found = torch.where(own.scores.isnan(), found, own.scores)
    return found


def prefix(order: Int[Tensor, "unit"], sizes: Float[Tensor, "unit"], share: float) -> int:
    """Return how many of the first units have this share of all sizes: at least one."""
    reached = sizes[order].cumsum(0)
    wanted = share * reached[-1] * (1 - 1e-12)
    return min(int((reached < wanted).sum()) + 1, len(order))


def with_ties(order: Int[Tensor, "unit"], values: Float[Tensor, "unit"], count: int) -> int:
    """Return a size at which no unit stays out that is worth as much as the last member, where that is short of all.

    What is worth more comes of another round of scores, or of what was learned, and is no tie.
    """
    last, size = float(values[order[count - 1]]), count
    while size < len(order) and last and abs(float(values[order[size]]) - last) <= TIE * abs(last):
        size += 1
    return size if size < len(order) else count


def resampled_orders(rounds: Sequence[Round], rank: Rank, seed: int = 0) -> list[Int[Tensor, "unit"]]:
    """Return the orders that `DRAWS` resamples of the problems would have given, from the scores that there are.

    What was learned stays as it is: a step answers the steps before, so that those of other problems are not to be had without
    learning again, and weighing each problem's share of the moves anew makes orders differ by far more than that does.
    """
    n, generator = rounds[0].scores.shape[1], torch.Generator().manual_seed(seed)
    found = []
    for _ in range(DRAWS):
        counts = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double() / n
        found.append(_ordered([own.mean(counts) for own in rounds], rank, rounds).int())
    return found


def membership(
    orders: Sequence[Int[Tensor, "unit"]], sizes: Float[Tensor, "unit"], share: float
) -> Float[Tensor, "unit"]:
    """Return in which share of the draws each unit is among the first that have this share of all sizes."""
    hits = torch.zeros(len(orders[0]), dtype=torch.float64)
    for order in orders:
        hits[order[: prefix(order, sizes, share)]] += 1
    return hits / len(orders)


def mean_jaccard(orders: Sequence[Int[Tensor, "unit"]], counts: Sequence[int]) -> tuple[float, float]:
    """Return the mean Jaccard similarity over all pairs of draws, of as many first units as each counts, and that of random sets.

    Random sets share units by their numbers: K and L are the two sets' own shares of the units, whatever else sizes count.
    """
    n, table = len(orders[0]), torch.zeros(len(orders), len(orders[0]), dtype=torch.float32)
    for row, order, count in zip(table, orders, counts, strict=True):
        row[order[:count]] = 1
    shared = (table @ table.T).double()
    one, other = torch.triu_indices(len(orders), len(orders), 1)
    both, own = shared[one, other], shared.diagonal()
    chance = by_chance(own[one] / n, own[other] / n)
    middle = chance[0] + (chance - chance[0]).mean()  # to the bit where sets are of one size
    return float((both / (own[one] + own[other] - both)).mean()), float(middle)


def by_chance(share: Shares, other: Shares) -> Shares:
    """Return the Jaccard similarity of random sets with these shares of all units: KL / (K + L − KL), K / (2 − K) of equal ones."""
    return share * other / (share + other - share * other)


def over_chance(jaccard: float, chance: float) -> float:
    """Return a Jaccard similarity as a share of what is above that `by_chance`."""
    return (jaccard - chance) / (1 - chance) if chance < 1 else 1.0


def stability(
    orders: Sequence[Int[Tensor, "unit"]], sizes: Float[Tensor, "unit"] | None = None
) -> dict[str, dict[str, float]]:
    """Return the Jaccard similarity over draws at three sizes, as it is and corrected for chance; by share of all `sizes`.

    Where units are of several sizes, draws have sets of several counts, and the correction is that of the means over pairs.
    """
    found, n = {}, len(orders[0])
    for share in STABLE_SHARES:
        counts = [max(round(share * n), 1)] * len(orders)
        if sizes is not None and bool((sizes != sizes[0]).any()):
            counts = [prefix(order, sizes, share) for order in orders]
        own, chance = mean_jaccard(orders, counts)
        found[f"{share:g}"] = {"jaccard": own, "over_chance": over_chance(own, chance)}
    return found
