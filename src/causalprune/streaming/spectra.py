"""How often each value occurs among the weights: what a global threshold takes to be found in one reading."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from causalprune.core import Decoder, ModelError, Projection, bands, room
from causalprune.pruning import (
    CRITERIA,
    Evidence,
    Factors,
    Method,
    Threshold,
    break_ties,
    prune_counts,
    threshold_of,
)

HALF = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Dtypes of 16 bits, and the bits of their infinity."""
SIGN = 0x7FFF


class Spectra:
    """How often each value occurs: enough to find a global threshold among 16-bit weights without scoring them twice.

    The score of such a weight has 2^15 possible values for each factor, whatever the size of the model.
    """

    def __init__(self, method: Method, factors: Factors) -> None:
        criterion = CRITERIA[method.criterion]
        self._wanted = method.resolved_scope == "global" and criterion.by_value
        self._method, self.factors, self._score = method, factors, criterion.score
        self._values: list[Tensor] = []
        self._times: list[Tensor] = []
        self._complete = True

    def add(self, p: Projection) -> None:
        """Check that the weights of a projection are finite, and count them."""
        weight = p.read()
        finite = True
        if weight.dtype not in HALF:
            self._complete, finite = False, bool(torch.isfinite(weight).all())
        else:
            for factor, part in _by_factor(weight, self.factors.get(p.name)):
                times = _histogram(part)
                finite &= not bool(times[HALF[weight.dtype] :].any())
                there = times[: HALF[weight.dtype]].nonzero()[:, 0]
                if self._wanted:
                    values = there.to(torch.int16).view(weight.dtype)[:, None]
                    self._values.append(self._score(values, Evidence(factor=factor))[:, 0])
                    self._times.append(times[there])
        if not finite:
            raise ModelError(
                f"{p.parameter_name} ({p.name}) has weights that are not finite: use an intact copy"
            )

    def keeps(self, decoder: Decoder) -> Iterator[Bool[Tensor, "out in"]] | None:
        """Yield what stays of matrix after matrix under scope `global`, or return None where scores have to be ranked."""
        if not self._wanted or not self._complete:
            return None
        count = prune_counts([sum(p.size for p in decoder.projections)], self._method.sparsity)[0]
        threshold = threshold_of(torch.cat(self._values), torch.cat(self._times), count)
        return self._keeps(decoder.projections, threshold)

    def _keeps(self, pool: Sequence[Projection], threshold: Threshold) -> Iterator[Tensor]:
        left = threshold.ties
        for p in pool:
            weight = p.read()
            first, cut = self._cuts(p, weight.dtype, threshold)
            keep = room(weight.numel()).view(torch.bool).view(weight.shape)
            scored_alike = bool((first < cut).any())
            for band, patterns in _patterns(weight):
                stays = keep[band]
                low, high = (bound if len(bound) == 1 else bound[band] for bound in (first, cut))
                torch.ge(patterns, high if left else low, out=stays)
                if left and scored_alike:
                    left = break_ties(stays, (patterns >= low) & ~stays, left)
            yield keep

    def _cuts(self, p: Projection, dtype: torch.dtype, threshold: Threshold) -> tuple[Tensor, Tensor]:
        """Return the first bits that score as much as the threshold, and the first that score more, by factor.

        Scores rise with |w|, whose bits are in its order, so what stays is a matter of comparing bits.
        """
        limit = torch.tensor(threshold.bits, dtype=torch.int32).view(torch.float32)
        every = torch.arange(HALF[dtype]).to(torch.int16).view(dtype)[:, None]
        factor = self.factors.get(p.name)
        found = []
        for value in [None] if factor is None else factor.flatten().unique_consecutive():
            own = None if value is None else value.view(1, 1)
            scores = self._score(every, Evidence(factor=own))
            found.append(torch.stack([(scores < limit).sum(), (scores <= limit).sum()]))
        bounds = torch.stack(found, 1).to(torch.int16)
        if factor is None:
            return bounds[0].view(1, 1), bounds[1].view(1, 1)
        place = factor.flatten().unique_consecutive(return_inverse=True)[1]
        return bounds[0][place].view(factor.shape), bounds[1][place].view(factor.shape)


def _histogram(weight: Tensor) -> Tensor:
    """Return how often each pattern of bits occurs, but for the sign."""
    times = torch.zeros(SIGN + 1, dtype=torch.long)
    for _, patterns in _patterns(weight):
        times += torch.bincount(patterns.flatten(), minlength=SIGN + 1)
    return times


def _patterns(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield neighbouring rows, and their bits but for the sign, in memory that the next ones get."""
    every = bands(weight)
    own = weight.new_empty(weight[every[0]].shape, dtype=torch.int16)
    for band in every:
        rows = weight[band].view(torch.int16)
        yield band, torch.bitwise_and(rows, SIGN, out=own[: len(rows)])


def _by_factor(weight: Tensor, factor: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield neighbouring rows or columns that share a factor, with that factor as `[1 1]`."""
    if factor is None:
        yield None, weight
        return
    along = 0 if factor.shape[1] == 1 else 1
    values, lengths = factor.flatten().unique_consecutive(return_counts=True)
    parts = weight.split(lengths.tolist(), dim=along) if factor.numel() > 1 else [weight]
    for value, part in zip(values, parts, strict=True):
        yield value.view(1, 1), part
