"""What candidates are worth with some of them closed, the best first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.core import OptionError, Stage, say
from causalprune.correction.candidates import Candidates, Chosen
from causalprune.correction.evidence import DRIFT, HARM, ODDS, Looking, Need, Vector
from causalprune.correction.measuring import check_finite, named
from causalprune.correction.records import Contrast
from causalprune.correction.scores import SCORES, Known

LEAST = 0.25
"""A source that is far from its limit counts with this share of the one that is nearest."""
FREE = 0.01
"""Harm whose share a candidate counts with where there is no limit."""


@dataclass(eq=False)
class Ranking:
    """Who is looked at, how they are ranked, how many may go at most, and who is told."""

    looking: Looking
    how: Contrast
    most: int
    stage: Stage
    _known: tuple[str, dict[Need, Tensor]] | None = None
    _worth: Vector | None = None

    @property
    def candidates(self) -> Candidates:
        """Who is ranked."""
        return self.looking.candidates

    @property
    def harm(self) -> Float[Tensor, "source candidate"] | None:
        """The divergence to second order, for scores that look at it."""
        assert self._known is not None
        return self._known[1].get(HARM)

    @cached_property
    def _part(self) -> dict[Need, float]:
        """The parts of what closing does that scaling does, to first and to second order."""
        gone = 1 - self.candidates.factor
        return {ODDS: gone, HARM: gone**2, DRIFT: gone}

    def of(self, members: Chosen, shares: Mapping[str, float], name: str, most: int) -> Chosen:
        """Return the candidates that may go, the best first, with these members closed; `shares` of its limit is what each source loses by then."""
        score, closed = SCORES[self.how.score], named(members)
        if self._known is None or self._known[0] != closed:  # else it was looked at so already
            again = self._known is not None and DRIFT in self._known[1]
            self._known = closed, self._gathered(members, name)
            limit = self.how.limit_nats if math.isfinite(self.how.limit_nats) else FREE
            harm, sizes = self._expected(members, shares), self.candidates.magnitude
            own = score.of(Known(self._known[1], harm, sizes, limit / self.most, self.how.seed))
            self._worth = (own + self._worth) / 2 if again and self._worth is not None else own.clone()
        assert self._worth is not None
        worth = self._worth.clone()
        worth[~self.candidates.alive] = -torch.inf
        if not self.how.anew:
            worth[members] = -torch.inf
        worth = worth.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        best = worth.topk(min(most, len(worth)))
        order = best.indices[best.values > (0.0 if score.beneficial else -torch.inf)]
        if not len(order) and not len(members):
            raise OptionError(
                "closing no candidate is expected to lower the log-odds of what is undesired: give other samples, or other units"
            )
        return order

    def _gathered(self, members: Chosen, name: str) -> dict[Need, Tensor]:
        """Return what the score needs with these members closed; second orders are the intact model's where units are chosen anew."""
        needs, found = list(SCORES[self.how.score].needs), dict[Need, Tensor]()
        if self.how.anew and len(members):
            assert self._known is not None
            found[HARM] = self._known[1][HARM]
            needs[needs.index(HARM)] = DRIFT
        self._known = None
        with self.stage(name) as tell:
            say(tell, unit="batches")
            for need in needs:
                own = self.looking.gather(need, members, named(members), tell)
                check_finite(self.candidates.decoder, "scores", own)
                found[need] = own * self._part.get(need, 1.0)
        return found

    def _expected(self, members: Chosen, shares: Mapping[str, float]) -> Vector | None:
        """Return the harm that is expected of every candidate.

        That is its divergence to second order, of the source where that is largest; once members are closed the slope there and
        the second order, of all sources, those the more that are nearer to their limit. Of a member it is what opening it again would spare.
        """
        assert self._known is not None
        gathered = self._known[1]
        if HARM not in gathered:
            return None
        if DRIFT not in gathered:
            return gathered[HARM].amax(0)
        near = torch.tensor([shares[source] for source in self.looking.half.sources])
        near = near.clamp_min(max(LEAST * float(near.max()), torch.finfo(near.dtype).tiny))
        closed = torch.zeros(self.candidates.count, dtype=torch.bool)
        closed[members] = True
        each = torch.where(closed, -gathered[HARM], gathered[HARM]) - gathered[DRIFT]
        return (near / near.sum()).to(each) @ each


def spared(harm: Tensor | None, failed: Chosen, order: Chosen) -> Chosen:
    """Return an order with those in front of which less harm is expected than of one that does too much."""
    if harm is None:
        return order
    less = harm[:, order].amax(0) < harm[:, failed].amax(0)
    return torch.cat([order[less], order[~less]])


def expected(harm: Tensor | None, order: Chosen, before: float) -> Float[Tensor, "_"]:
    """Return the divergence expected of the first candidates of an order, NaN where none is."""
    if harm is None:
        return torch.full((len(order),), math.nan)
    return before + harm[:, order].cumsum(1).amax(0)
