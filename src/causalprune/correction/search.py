"""Which candidates go: scored in rounds, as many as the measured harm allows, found by interpolation."""

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
from causalprune.correction.evidence import Looking
from causalprune.correction.measuring import Measured, Trials
from causalprune.correction.ranking import Ranking, expected, spared
from causalprune.correction.records import Contrast, Point

Found: TypeAlias = tuple[Chosen, Point]
NONE = torch.zeros(0, dtype=torch.long)
COARSE, FINE = 0.5, 0.05
"""Numbers are told apart to this share, in rounds on the way and in the last one."""
ENOUGH = 0.6
"""In rounds on the way a number is the largest that is looked for where it takes this share of the limit, or more of it."""
POWER, STEP = 1.3, 1.25
"""Harm grows about as this power of the number; how far below one that is too many the next is, at least."""
TRIES, OTHERS = 8, 10_000
"""Candidates that are closed alone where the first does too much harm, and those by score among which they are."""


@dataclass(frozen=True)
class Turn:
    """A round: which, of how many, and how much harm it may do as a share of the limit."""

    number: int
    rounds: int
    part: float

    @property
    def last(self) -> bool:
        """Whether no other follows."""
        return self.number == self.rounds

    def largest(self, share_of: Callable[[int, int], float], low: int, most: int, near: int = 0) -> int:
        """Measure numbers until the largest that fits is known as well as this round needs it; see `_largest`."""
        how = (FINE, 1.0) if self.last else (COARSE, ENOUGH)
        return _largest(share_of, low, most, near, *how)


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

    @cached_property
    def ranking(self) -> Ranking:
        """What candidates are worth."""
        return Ranking(self.looking, self.how, self.most, self.stage)

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
            turn = Turn(number, self.how.rounds, part)
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

    def _turn(self, members: Chosen, before: Point | None, most: int, turn: Turn) -> list[Found]:
        """Score with these members closed, and measure numbers up to `most` until the largest within the limit is known.

        Where the first candidate alone is above it in the last round, up to `TRIES` others are closed alone until one is not.
        """
        order, harms = self.ranked(members, turn.number, before)
        stay, near = (NONE, len(members)) if self.how.anew else (members, 0)
        found, room = list[Found](), max(most - len(stay), 0)
        with self.stage(self._named("sizes", turn.number)) as tell:
            say(tell, unit="sizes")

            def share_of(count: int, left: int) -> float:
                chosen = torch.cat([stay, order[:count]])
                point = self.point(chosen, turn.number, float(harms[count - 1]))
                found.append((chosen, point))
                self.curve.append(point)
                tell(len(found), len(found) + math.ceil(math.log2(max(left, 1))))
                return self._share(point) / turn.part

            if turn.largest(share_of, 0, min(len(order), room), near) or not room or not len(order):
                return found
            if turn.last:
                every, _ = self.ranked(members, turn.number, before, self.most + OTHERS)
                order = spared(self.ranking.harm, order[:1], every[every != order[:1]])
                for _ in range(min(TRIES, len(order))):
                    harms = expected(self.ranking.harm, order, self._predicted(before))
                    if share_of(1, TRIES) <= 1:
                        turn.largest(share_of, 1, min(len(order), room))
                        break
                    order = spared(self.ranking.harm, order[:1], order[1:])
        return found

    def _predicted(self, before: Point | None) -> float:
        """Return the divergence that is expected of what stays chosen."""
        return 0.0 if before is None or self.how.anew else before.predicted

    def ranked(
        self, members: Chosen, number: int, before: Point | None, most: int | None = None
    ) -> tuple[Chosen, Float[Tensor, "_"]]:
        """Return the candidates that may go next, the best first, and the divergence expected of the first of them.

        `before` is what was measured with these members closed.
        """
        shares = {} if before is None else self._shares(before)
        order = self.ranking.of(members, shares, self._named("scores", number), most or self.most)
        return order, expected(self.ranking.harm, order, self._predicted(before))

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


def _largest(
    share_of: Callable[[int, int], float], low: int, most: int, near: int, apart: float, enough: float = 1.0
) -> int:
    """Measure which share of the limit numbers above one that fits take, and return the largest that is known to take no more.

    The first is one that the largest is expected to be `near`, or the highest; `share_of` is told how many are left too. Shares
    grow about as a power of the number, so that the next is where they are expected to be 1, between the two nearest. It ends
    where those are no further `apart` than this share of the lower one, or where that takes `enough` of the limit.
    """
    if most <= low:
        return low
    at, high = near if low < near < most else most, most + 1
    shares = dict[int, float]()
    while high - low > max(1, apart * low) or (high > most and low < most):
        shares[at] = share_of(at, min(high, most) - low)
        low, high = (at, high) if shares[at] <= 1 else (low, at)
        if shares.get(low, 0.0) >= enough:
            break
        inside = max(low + 1, int(low * (1 + apart))) if high > most else low + 1
        at = min(
            max(inside, round(_crossing(low, shares.get(low, math.nan), high, shares.get(high, math.nan)))),
            high - 1,
        )
    return low


def _crossing(low: int, below: float, high: int, above: float) -> float:
    """Return where the share of the limit is expected to be 1, from those at two numbers or at one of them, NaN where not known."""
    start = max(low, 1)
    known = [0 < share < math.inf for share in (below, above)]
    if all(known):
        return float(start * (high / start) ** (math.log(below) / math.log(below / above)))
    if known[0]:
        return float(min(low * below ** (-1 / POWER), 2 * low))
    if known[1] and not low:
        return float(min(high * above ** (-1 / POWER), high / STEP))
    return math.sqrt(start * high)


def _by_source(sources: Sequence[str], values: Float[Tensor, "example"]) -> dict[str, Value]:
    names = dict.fromkeys(sources)
    return {name: summed_up(values[[i for i, own in enumerate(sources) if own == name]]) for name in names}
