"""How often each value occurs among the weights: what a global threshold takes to be found in one reading."""

from collections.abc import Iterator

import torch
from torch import Tensor

from causalprune.allocation import Threshold, prune_counts, threshold_of
from causalprune.criteria import CRITERIA, Evidence
from causalprune.errors import ModelError
from causalprune.methods import Method
from causalprune.pruning import Factors
from causalprune.types import Decoder, Projection

HALF = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Dtypes of 16 bits, and the bits of their infinity."""
SIGN = 0x7FFF


class Spectra:
    """How often each value occurs: enough to find a global threshold among 16-bit weights without scoring them twice.

    The score of such a weight has 2^15 possible values for each factor, whatever the size of the model.
    """

    def __init__(self, method: Method, factors: Factors) -> None:
        criterion = CRITERIA[method.criterion]
        self._wanted = method.resolved_scope == "global" and criterion.needs in ("weights", "effects")
        self._method, self._factors, self._score = method, factors, criterion.score
        self._values: list[Tensor] = []
        self._times: list[Tensor] = []
        self._complete = True

    def add(self, p: Projection) -> None:
        """Check that the weights of a projection are finite, and count them."""
        weight = p.read()
        half = weight.dtype in HALF
        patterns = weight.view(torch.int16) & SIGN if half else None
        finite = torch.isfinite(weight).all() if patterns is None else patterns.amax() < HALF[weight.dtype]
        if not bool(finite):
            raise ModelError(
                f"{p.parameter_name} ({p.name}) has weights that are not finite: use an intact copy"
            )
        if patterns is None:
            self._complete = False
        elif self._wanted:
            for factor, part in _by_factor(patterns, self._factors.get(p.name)):
                times = torch.bincount(part.flatten(), minlength=SIGN + 1)
                there = times.nonzero()[:, 0]
                values = there.to(torch.int16).view(weight.dtype)[:, None]
                self._values.append(self._score(values, Evidence(factor=factor))[:, 0])
                self._times.append(times[there])

    def threshold(self, decoder: Decoder) -> Threshold | None:
        """Return the threshold of scope `global`, or None where it has to be found from the scores themselves."""
        if not self._wanted or not self._complete:
            return None
        count = prune_counts([sum(p.size for p in decoder.projections)], self._method.sparsity)[0]
        return threshold_of(torch.cat(self._values), torch.cat(self._times), count)


def _by_factor(patterns: Tensor, factor: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield the parts of a matrix whose weights share a factor, with that factor as `[1 1]`."""
    if factor is None or factor.numel() == 1:
        yield factor, patterns
        return
    along = 0 if factor.shape[1] == 1 else 1
    for value in factor.unique():
        index = (factor.flatten() == value).nonzero()[:, 0]
        yield value.view(1, 1), patterns.index_select(along, index)
