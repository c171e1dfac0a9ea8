"""Which candidates go: scored in rounds, as many as the measured harm allows, found by halving."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.circuits import Value, summed_up
from causalprune.core import OptionError, Stage, say
from causalprune.correction.behaviours import CLEAN
from causalprune.correction.candidates import Candidates, Chosen
from causalprune.correction.evidence import HARM, ODDS, Looking, Need
from causalprune.correction.measuring import Measured, Trials, check_finite, named
from causalprune.correction.records import Contrast, Point
from causalprune.correction.scores import SCORES, Known

Found: TypeAlias = tuple[Chosen, Point]
NONE = torch.zeros(0, dtype=torch.long)
COARSE, FINE = 0.25, 0.05
"""Numbers are told apart to this share, in rounds on the way and in the last one."""
FREE = 0.01
"""Harm whose share a candidate counts with where there is no limit."""
TRIES, OTHERS = 8, 10_000
"""Candidates that are closed alone where the first does too much harm, and those by score among which they are."""


@dataclass(frozen=True)
class Turn:
    """A round: which, how much harm it may do, and how near to each other numbers are told apart, as a share."""

    number: int
    limit: float
    apart: float


@dataclass(eq=False)
class Search:
    """What is searched, how, on what, and who is told."""

    candidates: Candidates
    looking: Looking
    trials: Trials
    how: Contrast
    most: int
    stage: Stage
    curve: list[Point] = field(default_factory=list)
    _known: tuple[str, dict[Need, Tensor]] | None = None

    @cached_property
    def _part(self) -> dict[Need, float]:
        """The parts of what closing does that scaling does, to first and to second order."""
        gone = 1 - self.candidates.factor
        return {ODDS: gone, HARM: gone**2}

    def run(self) -> Found:
        """Return what goes, and what the model was measured to do without it.

        Raises:
            ModelError: scores or losses are not finite.
            OptionError: nothing is worth taking out, all does more harm than is allowed, or nothing comes of it.
        """
        begun: tuple[Chosen, Point | None] = (NONE, None)
        last, fitting = list[Found](), list[Found]()
        for number in range(1, self.how.rounds + 1):
            part, final = number / self.how.rounds, number == self.how.rounds
            turn = Turn(number, self.how.limit_nats * part, FINE if final else COARSE)
            last = self._turn(*begun, math.ceil(self.most * part), turn)
            fitting = [own for own in last if self._worst(own[1]) <= turn.limit]
            if not final and fitting:
                begun = max(fitting, key=lambda own: own[1].count)
        if begun[1] is not None:
            fitting.append((begun[0], begun[1]))
        if not fitting:
            alone = sum(point.count == 1 for _, point in last)
            least = min(self._worst(point) for _, point in last)
            raise OptionError(
                f"of {alone} candidates that were closed alone none leaves the harm to what is to be preserved within "
                f"{100 * self.how.harm:.3g}% of perplexity: the smallest found is {100 * math.expm1(least):.3g}% ({least:.3g} nats): "
                "allow more (--harm), or take smaller units"
            )
        chosen, point = max(fitting, key=lambda own: (own[1].benefit.value, -own[1].count))
        if not point.benefit.value > 0:
            raise OptionError(
                "taking out what scores highest does not lower the log-odds of what is undesired on the deciding half "
                f"({-point.benefit.value:+.3g} without {point.count:,}): give more samples, or another score"
            )
        return chosen, point

    def _named(self, what: str, number: int) -> str:
        return f"{what}, round {number} of {self.how.rounds}" if self.how.rounds > 1 else what

    @cached_property
    def intact(self) -> Measured:
        """What the model does before anything is closed."""
        return self.trials.without(self.candidates, NONE)

    def _worst(self, point: Point) -> float:
        return point.worst(certain=self.how.certain)

    def _turn(self, members: Chosen, before: Point | None, most: int, turn: "Turn") -> list[Found]:
        """Score with these members closed, and measure numbers up to `most` until the largest within the limit is known.

        Where the first candidate alone is above it in the last round, up to `TRIES` others are closed alone until one is not.
        """
        predicted = before.predicted if before else 0.0
        order, harms = self.ranked(members, turn.number, predicted)
        found, room = list[Found](), max(most - len(members), 0)
        with self.stage(self._named("sizes", turn.number)) as tell:
            say(tell, unit="sizes")

            def fits(count: int, left: int) -> bool:
                chosen = torch.cat([members, order[:count]])
                point = self.point(chosen, turn.number, float(harms[count - 1]))
                found.append((chosen, point))
                self.curve.append(point)
                tell(len(found), len(found) + math.ceil(math.log2(max(left, 1))))
                return self._worst(point) <= turn.limit

            if _largest(fits, 0, min(len(order), room), turn.apart) or not room or not len(order):
                return found
            if turn.number == self.how.rounds:
                every, _ = self.ranked(members, turn.number, 0.0, self.most + OTHERS)
                order = _spared(self._harm, order[:1], every[every != order[:1]])
                for _ in range(min(TRIES, len(order))):
                    harms = _expected(self._harm, order, predicted)
                    if fits(1, TRIES):
                        _largest(fits, 1, min(len(order), room), turn.apart)
                        break
                    order = _spared(self._harm, order[:1], order[1:])
        return found

    @property
    def _harm(self) -> Tensor | None:
        assert self._known is not None
        return self._known[1].get(HARM)

    def ranked(
        self, members: Chosen, number: int, before: float, most: int | None = None
    ) -> tuple[Chosen, Float[Tensor, "_"]]:
        """Return the candidates that may go next, the best first, and the divergence expected of the first of them."""
        score, closed = SCORES[self.how.score], named(members)
        if self._known is None or self._known[0] != closed:  # else no more was taken out since
            self._known = None
            with self.stage(self._named("scores", number)) as tell:
                say(tell, unit="batches")
                gathered = {need: self.looking.gather(need, members, closed, tell) for need in score.needs}
            for own in gathered.values():
                check_finite(self.candidates.decoder, "scores", own)
            self._known = closed, {need: own * self._part.get(need, 1.0) for need, own in gathered.items()}
        limit = self.how.limit_nats if math.isfinite(self.how.limit_nats) else FREE
        known = Known(self._known[1], self.candidates.magnitude, limit / self.most, self.how.seed)
        worth = score.of(known).clone()
        worth[~self.candidates.alive] = -torch.inf
        worth[members] = -torch.inf
        worth = worth.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        best = worth.topk(min(most or self.most, len(worth)))
        order = best.indices[best.values > (0.0 if score.beneficial else -torch.inf)]
        if not len(order) and not len(members):
            raise OptionError(
                "closing no candidate is expected to lower the log-odds of what is undesired: give other samples, or other units"
            )
        return order, _expected(self._harm, order, before)

    def point(self, chosen: Chosen, number: int, predicted: float) -> Point:
        """Measure the model without some candidates."""
        return self.of(self.trials.without(self.candidates, chosen), chosen, number, predicted)

    def of(self, found: Measured, chosen: Chosen, number: int, predicted: float) -> Point:
        """Return what was measured beside the model before."""
        sources = [example.source for example in self.trials.half.preserve]
        clean = torch.tensor([source.startswith(CLEAN) for source in sources])
        harm = torch.where(clean, found.kl, found.nats - self.intact.nats)
        return Point(
            len(chosen),
            len(chosen) / self.candidates.count,
            self.candidates.weights(chosen),
            number,
            summed_up(self.intact.odds - found.odds),
            _by_source(sources, harm),
            _by_source(sources, found.kl),
            predicted,
        )


def _largest(fits: Callable[[int, int], bool], low: int, high: int, apart: float) -> int:
    """Measure numbers above one that fits, and return the largest that is known to; `fits` is told how many are left too."""
    if high <= low or fits(high, high - low):
        return max(high, low)
    while high - low > max(1, apart * low):
        middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
        low, high = (middle, high) if fits(middle, high - low) else (low, middle)
    return low


def _spared(harm: Tensor | None, failed: Chosen, order: Chosen) -> Chosen:
    """Return an order with those in front of which less harm is expected than of one that does too much."""
    if harm is None:
        return order
    less = harm[:, order].amax(0) < harm[:, failed].amax(0)
    return torch.cat([order[less], order[~less]])


def _expected(harm: Tensor | None, order: Chosen, before: float) -> Float[Tensor, "_"]:
    """Return the divergence expected of the first candidates of an order, NaN where none is."""
    if harm is None:
        return torch.full((len(order),), math.nan)
    return before + harm[:, order].cumsum(1).amax(0)


def _by_source(sources: Sequence[str], values: Float[Tensor, "example"]) -> dict[str, Value]:
    names = dict.fromkeys(sources)
    return {name: summed_up(values[[i for i, own in enumerate(sources) if own == name]]) for name in names}
