"""Budgets: which weights go, exactly as many as asked, ties broken by position.

A score is never compared with a rounded threshold alone. Non-negative float32 numbers have the order of
their bit patterns, so the exact k-th smallest comes from two histograms over 16 bits each, in constant
memory and without ever joining the matrices: the same path serves one matrix, a model, or a stream.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalprune.core import OptionError

HALF_BITS = 16
STEPS = 161
"""Sparsities among which a group chooses."""
UNITS = 100_000
TINY = 1e-12
"""Divergences below this many nats are rounding."""


@dataclass(frozen=True)
class Threshold:
    """Weights whose score has bits below `bits` go, and the first `ties` of those equal to it."""

    bits: int
    ties: int


def prune_counts(sizes: Sequence[int], sparsity: float | Sequence[float]) -> list[int]:
    """Return how many weights each block loses, so that every prefix is at its sparsity to the single weight.

    `sparsity` is one for all blocks or one for each. Rounding is carried over from block to block: with one for all,
    the total is `round(sparsity · Σ sizes)`.
    """
    counts, weights, pruned, wanted = [], 0, 0, 0.0
    for i, size in enumerate(sizes):
        weights += size
        wanted = sparsity * weights if isinstance(sparsity, float) else wanted + sparsity[i] * size
        target = int(round(wanted, 6) + 0.5)  # sums of shares carry rounding errors
        counts.append(target - pruned)
        pruned = target
    return counts


def graded_shares(
    nats: Float[Tensor, "group dose"], sparsities: Sequence[float], sizes: Sequence[int], sparsity: float
) -> Float[Tensor, "group"]:
    """Return the sparsity of every group that loses the task least, at `sparsity` over all groups.

    Minimises `Σ f_g(s_g)` with `Σ size_g · s_g = sparsity · Σ size_g`, each s_g within the sparsities that were
    tried. `f_g` goes through the measured losses (nats) of group g, its logarithm straight in between. Solved by
    one price for a pruned weight, at which every group chooses for itself (Lagrange; exact where f is convex).
    """
    grid = torch.linspace(sparsities[0], sparsities[-1], STEPS, dtype=torch.float64)
    known, weights = torch.tensor(sparsities, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    logs = nats.double().clamp_min(TINY).log().cummax(1).values
    right = torch.searchsorted(known, grid).clamp(1, len(known) - 1)
    part = (grid - known[right - 1]) / (known[right] - known[right - 1])
    curves = (logs[:, right - 1] * (1 - part) + logs[:, right] * part).exp()

    def chosen(log_price: float) -> Tensor:
        return grid[(curves - math.exp(log_price) * weights[:, None] * grid).argmin(1)]

    low, high = -100.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if chosen(middle) @ weights < sparsity * weights.sum() else (low, middle)
    cheap, dear = chosen(low), chosen(high)
    reach = float((dear - cheap) @ weights)
    left = float(sparsity * weights.sum() - cheap @ weights)
    return cheap + (dear - cheap) * (left / reach if reach > 0 else 0.0)


def dense_shares(
    nats: Float[Tensor, "group"], sizes: Sequence[int], pattern: float, sparsity: float
) -> list[float]:
    """Return for every group the sparsity `pattern`, or 0 where it stays dense: at least `sparsity` over all groups.

    Those stay dense that together would cost the most nats, within the room that `sparsity` leaves (the knapsack problem,
    exact where sizes have a common divisor of at least `1 / UNITS` of all, as matrices of one model have).
    """
    unit = max(math.gcd(*sizes), sum(sizes) // UNITS)
    room = int((1 - sparsity / pattern) * sum(sizes) + 1e-6) // unit
    best, better = torch.zeros(room + 1, dtype=torch.float64), []
    units = [-(-size // unit) for size in sizes]
    for own, gain in zip(units, nats.double().clamp_min(0).tolist(), strict=True):
        dense = best.new_full(best.shape, -1.0)
        dense[own:] = best[: max(len(best) - own, 0)] + gain
        better.append(dense > best)
        best = best.maximum(dense)
    shares = [pattern] * len(sizes)
    for i in reversed(range(len(sizes))):
        if bool(better[i][room]):
            shares[i], room = 0.0, room - units[i]
    return shares


def spread(count: int, n_rows: int) -> Int[Tensor, "out"]:
    """Return `count` spread over rows as evenly as whole numbers allow."""
    edges = torch.arange(n_rows + 1) * count // n_rows
    return edges.diff()


def find_threshold(scores: Callable[[], Iterable[Float[Tensor, "out in"]]], count: int) -> Threshold:
    """Return the threshold that prunes exactly `count` of the scores that `scores()` yields, called twice.

    Raises:
        ValueError: a score is negative or not a number.
    """
    if count == 0:
        return Threshold(bits=0, ties=0)
    coarse = torch.zeros(1 << (HALF_BITS - 1), dtype=torch.long)
    for score in scores():
        coarse += torch.bincount(_bits(score) >> HALF_BITS, minlength=len(coarse)).cpu()
    high, below = _bin_of(coarse, count)
    fine = torch.zeros(1 << HALF_BITS, dtype=torch.long)
    for score in scores():
        bits = _bits(score)
        low_bits = bits[bits >> HALF_BITS == high] & ((1 << HALF_BITS) - 1)
        fine += torch.bincount(low_bits, minlength=len(fine)).cpu()
    low, below_in_bin = _bin_of(fine, count - below)
    return Threshold(bits=(high << HALF_BITS) | low, ties=count - below - below_in_bin)


def threshold_of(values: Float[Tensor, "value"], times: Int[Tensor, "value"], count: int) -> Threshold:
    """Return the threshold that prunes exactly `count` of the scores, of which `values[i]` occurs `times[i]` times."""
    if count == 0:
        return Threshold(bits=0, ties=0)
    bits = _bits(values)
    order = bits.argsort()
    last = order[torch.searchsorted(times[order].cumsum(0), count)]
    below = int(times[bits < bits[last]].sum())
    return Threshold(int(bits[last]), count - below)


def keep_above(
    score: Float[Tensor, "out in"], threshold: Threshold
) -> tuple[Bool[Tensor, "out in"], Threshold]:
    """Return what stays of one matrix, and the threshold with the ties left for the next one."""
    _check(score)
    if not threshold.bits and not threshold.ties:
        return torch.ones_like(score, dtype=torch.bool), threshold
    score, limit = score.float(), torch.tensor(threshold.bits, dtype=torch.int32).view(torch.float32)
    keep = score > limit.to(score.device)
    left = break_ties(keep, score == limit.to(score.device), threshold.ties)
    return keep, Threshold(threshold.bits, left)


def break_ties(keep: Bool[Tensor, "out in"], tied: Bool[Tensor, "out in"], ties: int) -> int:
    """Keep, in place, all of the tied weights but the first `ties`; return how many are left to go elsewhere."""
    there = int(torch.count_nonzero(tied))
    if there <= ties:
        return ties - there
    by_row = torch.count_nonzero(tied, dim=1)
    # the first row that has more of them than may go
    row = int(torch.searchsorted(by_row.cumsum(0), ties, right=True))
    keep[row + 1 :] |= tied[row + 1 :]
    keep[row] |= tied[row] & (tied[row].cumsum(0) > ties - int(by_row[:row].sum()))
    return 0


def keep_matrix(score: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """Return what stays when the `count` lowest scores of one matrix go."""
    return keep_above(score, find_threshold(lambda: [score], count))[0]


def keep_rows(score: Float[Tensor, "out in"], counts: Int[Tensor, "out"]) -> Bool[Tensor, "out in"]:
    """Return what stays when row i loses its `counts[i]` lowest scores (outputs are compared per row)."""
    _check(score)
    counts, threshold = counts.to(score.device), torch.full_like(score[:, :1], -1.0)
    for count in counts.unique().tolist():
        if count:
            rows = counts == count
            threshold[rows, 0] = score[rows].kthvalue(count, dim=1).values
    goes, tied = score < threshold, score == threshold
    left = counts - goes.sum(1)
    if bool((tied.sum(1) > left).any()):
        tied &= tied.cumsum(1) <= left[:, None]
    return ~(goes | tied)


def keep_n_of_m(score: Float[Tensor, "out in"], n: int, m: int) -> Bool[Tensor, "out in"]:
    """Return what stays when of every `m` neighbouring inputs of a row the `n` best stay.

    Raises:
        OptionError: the inputs cannot be cut into groups of `m`.
    """
    if score.shape[1] % m:
        raise OptionError(f"{n}:{m} needs a multiple of {m} inputs, and a matrix has {score.shape[1]}")
    groups = score.reshape(-1, m)
    return keep_rows(groups, torch.full((len(groups),), m - n)).view(score.shape)


def keep_columns(
    scope: str, count: int, shape: tuple[int, int], score: Tensor, start: int
) -> Bool[Tensor, "out group"]:
    """Return what stays of neighbouring columns from `start` on, their share of the `count` that goes removed."""
    stop = start + score.shape[1]
    if scope == "matrix":
        return keep_matrix(score, count * stop // shape[1] - count * start // shape[1])
    if scope == "row":
        rows = spread(count, shape[0])
        return keep_rows(score, rows * stop // shape[1] - rows * start // shape[1])
    if not count:
        return torch.ones_like(score, dtype=torch.bool)  # this matrix stays dense
    n, m = (int(number) for number in scope.split(":"))
    return keep_n_of_m(score, n, m)


def _check(score: Tensor) -> None:
    if score.numel() and not bool(score.amin() >= 0):  # false for NaN too
        raise ValueError("scores must be numbers ≥ 0")


def _bits(score: Tensor) -> Tensor:
    _check(score)
    return score.float().flatten().abs().view(torch.int32)


def _bin_of(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the bin that holds the `count`-th smallest value, and how many values lie below that bin."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, count))
    return index, int(cumulative[index] - histogram[index])
