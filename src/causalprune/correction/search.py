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
from causalprune.correction.evidence import DRIFT, HARM, ODDS, Looking, Need, Vector
from causalprune.correction.measuring import Measured, Trials, check_finite, named
from causalprune.correction.records import Contrast, Point
from causalprune.correction.scores import SCORES, Known

Found: TypeAlias = tuple[Chosen, Point]
NONE = torch.zeros(0, dtype=torch.long)
COARSE, FINE = 0.25, 0.05
"""Numbers are told apart to this share, in rounds on the way and in the last one."""
FREE = 0.01
"""Harm whose share a candidate counts with where there is no limit."""
STEP = 1.25
"""Numbers around an expected one are so far apart."""
LEAST = 0.25
"""A source that is far from its limit counts with this share of the one that is nearest."""
TRIES, OTHERS = 8, 10_000
"""Candidates that are closed alone where the first does too much harm, and those by score among which they are."""


@dataclass(frozen=True)
class Turn:
    """A round: which, how much harm it may do as a share of the limit, and how near to each other numbers are told apart, as a share."""

    number: int
    part: float
    apart: float


@dataclass(eq=False)
class Search:
    """What is searched, how, on what, and who is told.

    Units by `contrast` are chosen anew in every round, with what was chosen before closed: its own units too, which may come
    back. By other scores, and of single weights, what was chosen stays, and every round adds its part of budget and harm.
    """

    candidates: Candidates
    looking: Looking
    trials: Trials
    how: Contrast
    most: int
    stage: Stage
    curve: list[Point] = field(default_factory=list)
    _known: tuple[str, dict[Need, Tensor]] | None = None
    _worth: Vector | None = None

    @cached_property
    def _part(self) -> dict[Need, float]:
        """The parts of what closing does that scaling does, to first and to second order."""
        gone = 1 - self.candidates.factor
        return {ODDS: gone, HARM: gone**2, DRIFT: gone}

    def run(self) -> Found:
        """Return what goes, and what the model was measured to do without it.

        Raises:
            ModelError: scores or losses are not finite.
            OptionError: nothing is worth taking out, all does more harm than is allowed, or nothing comes of it.
        """
        begun: tuple[Chosen, Point | None] = (NONE, None)
        last, every = list[Found](), list[Found]()
        for number in range(1, self.how.rounds + 1):
            part = 1.0 if self.how.anew else number / self.how.rounds
            turn = Turn(number, part, FINE if number == self.how.rounds else COARSE)
            last = self._turn(*begun, math.ceil(self.most * part), turn)
            fitting = [own for own in last if self._share(own[1]) <= part]
            if fitting:
                begun = max(fitting, key=lambda own: own[1].count)
            every += fitting
        if not every:
            alone = sum(point.count == 1 for _, point in last)
            least = min(point.worst(certain=self.how.certain) for _, point in last)
            raise OptionError(
                f"of {alone} candidates that were closed alone none leaves the harm to what is to be preserved within "
                f"{100 * self.how.harm:.3g}% of perplexity: the smallest found is {100 * math.expm1(least):.3g}% ({least:.3g} nats): "
                "allow more (--harm), or take smaller units"
            )
        return self._best(every)

    def _best(self, fitting: list[Found]) -> Found:
        """Return the one with the largest benefit among those that do no more harm than is allowed."""
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

    def _shares(self, point: Point) -> dict[str, float]:
        """Return by source which share of the harm that is allowed a point does."""
        certain = self.how.certain
        found = {source: own.high if certain else own.value for source, own in point.harm.items()}
        return {source: harm / self.how.limit_nats for source, harm in found.items()}

    def _share(self, point: Point) -> float:
        """Return the largest of them, NaN where one of them is."""
        shares = self._shares(point).values()
        return math.nan if any(map(math.isnan, shares)) else max(shares, default=0.0)

    def _turn(self, members: Chosen, before: Point | None, most: int, turn: "Turn") -> list[Found]:
        """Score with these members closed, and measure numbers up to `most` until the largest within the limit is known.

        Where the first candidate alone is above it in the last round, up to `TRIES` others are closed alone until one is not.
        """
        order, harms = self.ranked(members, turn.number, before)
        stay, near = (NONE, len(members)) if self.how.anew else (members, 0)
        found, room = list[Found](), max(most - len(stay), 0)
        with self.stage(self._named("sizes", turn.number)) as tell:
            say(tell, unit="sizes")

            def fits(count: int, left: int) -> bool:
                chosen = torch.cat([stay, order[:count]])
                point = self.point(chosen, turn.number, float(harms[count - 1]))
                found.append((chosen, point))
                self.curve.append(point)
                tell(len(found), len(found) + math.ceil(math.log2(max(left, 1))))
                return self._share(point) <= turn.part

            if _largest(fits, 0, min(len(order), room), turn.apart, near) or not room or not len(order):
                return found
            if turn.number == self.how.rounds:
                every, _ = self.ranked(members, turn.number, before, self.most + OTHERS)
                order = _spared(self._harm, order[:1], every[every != order[:1]])
                for _ in range(min(TRIES, len(order))):
                    harms = _expected(self._harm, order, self._predicted(before))
                    if fits(1, TRIES):
                        _largest(fits, 1, min(len(order), room), turn.apart)
                        break
                    order = _spared(self._harm, order[:1], order[1:])
        return found

    def _predicted(self, before: Point | None) -> float:
        """Return the divergence that is expected of what stays chosen."""
        return 0.0 if before is None or self.how.anew else before.predicted

    @property
    def _harm(self) -> Tensor | None:
        assert self._known is not None
        return self._known[1].get(HARM)

    def ranked(
        self, members: Chosen, number: int, before: Point | None, most: int | None = None
    ) -> tuple[Chosen, Float[Tensor, "_"]]:
        """Return the candidates that may go next, the best first, and the divergence expected of the first of them.

        `before` is what was measured with these members closed.
        """
        score, closed = SCORES[self.how.score], named(members)
        if self._known is None or self._known[0] != closed:  # else it was looked at so already
            again = self._known is not None and DRIFT in self._known[1]
            gathered = self._gathered(members, number)
            self._known = closed, gathered
            limit = self.how.limit_nats if math.isfinite(self.how.limit_nats) else FREE
            harm = self._expected_harm(members, before)
            known = Known(gathered, harm, self.candidates.magnitude, limit / self.most, self.how.seed)
            own = score.of(known)
            self._worth = (own + self._worth) / 2 if again and self._worth is not None else own.clone()
        assert self._worth is not None
        worth = self._worth.clone()
        worth[~self.candidates.alive] = -torch.inf
        if not self.how.anew:
            worth[members] = -torch.inf
        worth = worth.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        best = worth.topk(min(most or self.most, len(worth)))
        order = best.indices[best.values > (0.0 if score.beneficial else -torch.inf)]
        if not len(order) and not len(members):
            raise OptionError(
                "closing no candidate is expected to lower the log-odds of what is undesired: give other samples, or other units"
            )
        return order, _expected(self._harm, order, self._predicted(before))

    def _gathered(self, members: Chosen, number: int) -> dict[Need, Tensor]:
        """Return what the score needs with these members closed; second orders are those of the intact model where units are chosen anew."""
        needs, found = list(SCORES[self.how.score].needs), dict[Need, Tensor]()
        if self.how.anew and len(members):
            assert self._known is not None
            found[HARM] = self._known[1][HARM]
            needs[needs.index(HARM)] = DRIFT
        self._known = None
        with self.stage(self._named("scores", number)) as tell:
            say(tell, unit="batches")
            for need in needs:
                own = self.looking.gather(need, members, named(members), tell)
                check_finite(self.candidates.decoder, "scores", own)
                found[need] = own * self._part.get(need, 1.0)
        return found

    def _expected_harm(self, members: Chosen, before: Point | None) -> Vector | None:
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
        assert before is not None
        shares = self._shares(before)
        near = torch.tensor([shares[source] for source in self.looking.half.sources])
        near = near.clamp_min(max(LEAST * float(near.max()), torch.finfo(near.dtype).tiny))
        closed = torch.zeros(self.candidates.count, dtype=torch.bool)
        closed[members] = True
        each = torch.where(closed, -gathered[HARM], gathered[HARM]) - gathered[DRIFT]
        return (near / near.sum()).to(each) @ each

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


def _largest(fits: Callable[[int, int], bool], low: int, high: int, apart: float, near: int = 0) -> int:
    """Measure numbers above one that fits, and return the largest that is known to; `fits` is told how many are left too.

    The first to be measured are around one that the largest is expected to be `near`, or the highest.
    """
    if high <= low:
        return low
    first = near if low < near < high else high
    while fits(first, high - low):
        if first == high:
            return high
        low, first = first, min(max(int(first * STEP), first + 1), high)
    high = first
    while near and not low and high > 1:
        first = max(int(high / STEP), 1)
        low, high = (first, high) if fits(first, high - low) else (low, first)
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
