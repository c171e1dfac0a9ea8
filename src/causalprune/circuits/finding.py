"""From problems to a circuit: score in rounds, order, look for the size that keeps the behaviour, measure what is left of it."""

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalprune.attribution import ELSEWHERE, Estimator, Question, attribute
from causalprune.circuits.behaviour import (
    MEASURED,
    Behaviour,
    Keep,
    Trials,
    behaviour,
    check_apart,
    identity,
    scored,
)
from causalprune.circuits.curves import SHARES, Curve, Point, curve
from causalprune.circuits.learning import learned
from causalprune.circuits.ranking import (
    Rank,
    Round,
    cost_of,
    last_scores,
    membership,
    order_of,
    prefix,
    resampled_orders,
    stability,
    values_of,
    with_ties,
)
from causalprune.circuits.records import CIRCUIT, Circuit, carried, save_circuit
from causalprune.circuits.terms import check_problems, check_search, effect_for, turns
from causalprune.core import (
    METHOD_VERSION,
    Calibration,
    Decoder,
    Ledger,
    OptionError,
    Progress,
    Stage,
    State,
    bars,
    git_commit,
    say,
    versions,
)

LEDGER, SCORES, GATES = "circuit.ledger", "scores", "gates"
PER_WEIGHT = "score a weight"
WHOLE = "the folder (`circuit --overwrite` replaces what is in it)"
STEPS = 200
"""Parts of all units between which sizes are told apart."""


def circuit(  # noqa: PLR0913 (what a user says)
    decoder: Decoder,
    calibration: Calibration,
    question: Question | None = None,
    estimator: Estimator = Estimator("integrated"),
    *,
    decide: Calibration | None = None,
    keep: float = 0.9,
    rank: Rank = "absolute",
    rescore: int | None = None,
    folder: Path | str | None = None,
    stage: Stage | None = None,
) -> Circuit:
    """Find the smallest set of units that keeps a behaviour, and measure what sets of all sizes keep.

    Without a question heads are looked for, by the effect that `effect_for` names. Units are scored on the calibration, `rescore` times,
    each time with those closed that are out by then, and ordered by the mean over rounds of the mean score (`signed`: what helps) or of
    its size (`absolute`: what the behaviour hangs on), per weight where kinds are mixed. The order is then `learned` in the estimator's
    `epochs`; `turns` says how many of both there are. Sizes are measured on the problems of `decide`, or without on the second half of
    the calibration: the smallest that leaves the share `keep` of the likelihood per token is the circuit (for `absolute` to either
    side). What is finished is kept in `folder`, where the same call goes on, and the circuit in its `circuit.json`.

    Raises:
        OptionError: what is asked does not go together, or nothing short of all units keeps the share.
        DataError: there are fewer than 8 problems to score or to decide on.
        MismatchError: the folder holds what was measured of another model, or on other data.
    """
    question = question or Question(effect=effect_for(rank, estimator))
    estimator, rescore = turns(question, estimator, rescore, rank)
    check_search(question, estimator, keep, rank, rescore)
    calibration, decide = _sides(calibration, decide)
    how = estimator if {question.effect, estimator.name} & {"kl", *MEASURED} else replace(estimator, draws=0)
    ranked = behaviour(decoder, calibration.examples, question, how)
    _check_units(ranked)
    decided, place = behaviour(decoder, decide.examples, question, how, ranked.mean), folder and Path(folder)
    search = Search(ranked, decided, how, rank, keep, place or None, stage or bars)
    with ledger(ranked, decided, how, folder) as book:
        rounds, order, size, (found, chosen) = search.run(rescore, book)
    orders, every = resampled_orders(rounds, rank), last_scores(rounds)
    low, high = intervals(every)
    made = Circuit(
        units=tuple(ranked.units),
        order=order,
        size=size,
        score=every.mean(1),
        low=low,
        high=high,
        probability=membership(orders, search.sizes, chosen.share),
        weights=ranked.weights,
        curve=found,
        chosen=chosen,
        stability=stability(orders, search.sizes),
        problems=tuple(decide.examples),
        model_fingerprint=ranked.plan.model_fingerprint,
        description=search.described(rescore, calibration=calibration.description, decide=decide.description),
    )
    if place:
        made = carried(made, place / CIRCUIT) or made
        save_circuit(made, place / CIRCUIT)
    return made


def _check_units(ranked: Behaviour) -> None:
    """Raise `OptionError` for units of which no circuit can be chosen."""
    asked = ranked.plan.question.units
    check_apart(ranked.plan.units, asked)
    if len(ranked.units) == 1:
        raise OptionError(
            f"{ranked.decoder.name} has only one unit of {', '.join(asked)}, so there is nothing to choose: ask for smaller units (--units)"
        )


def _sides(calibration: Calibration, decide: Calibration | None) -> tuple[Calibration, Calibration]:
    """Return the problems to score and to decide on, as they may be asked."""
    if wrong := [own for own in (calibration, decide or calibration) if not isinstance(own, Calibration)]:
        raise OptionError(f"problems come as `cp.calibrate` returns them, not as a {type(wrong[0]).__name__}")
    sides = (calibration, decide) if decide else halves(calibration)
    check_problems(*sides, halved=not decide)
    return sides


def halves(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Return every other problem to score on, and the others to decide on; those of one prompt stay together."""
    number: dict[str, int] = {}
    for example in calibration.examples:
        number.setdefault(example.content, len(number))
    sides = [tuple(own for own in calibration.examples if number[own.content] % 2 == side) for side in (0, 1)]
    score, decide = (Calibration(side, (0,) * len(side), calibration.description) for side in sides)
    return score, decide


def ledger(
    ranked: Behaviour, decided: Behaviour, how: Estimator, folder: Path | str | None
) -> AbstractContextManager[Ledger | None]:
    """Return a context with the ledger of a search, where there is a folder."""
    if folder is None:
        return nullcontext()
    own = {
        "estimator": _lasting(how),
        "decide": decided.fingerprint(),
        "decide_batches": identity(decided)["batches"],
    }
    return Ledger(Path(folder) / LEDGER, identity(ranked) | own, whole=WHOLE)


def _lasting(how: Estimator) -> dict[str, Any]:
    return {key: value for key, value in asdict(how).items() if key not in ELSEWHERE}


def intervals(scores: Float[Tensor, "unit problem"]) -> tuple[Float[Tensor, "unit"], Float[Tensor, "unit"]]:
    """Return the 95 % interval of each unit's mean over problems, by Student's t."""
    n = scores.shape[1]
    reach = scores.std(1) / math.sqrt(n) * float(scipy.special.stdtrit(n - 1, 0.975))
    return scores.mean(1) - reach, scores.mean(1) + reach


@dataclass(frozen=True, eq=False)
class Search:
    """What is searched, on what, and who is told."""

    ranked: Behaviour
    decided: Behaviour
    how: Estimator
    rank: Rank
    share: float
    folder: Path | None
    stage: Stage

    def rounds(self, count: int) -> list[Round]:
        """Score in rounds, each with the units closed that are out by then: equal parts of all go out; then learn gates."""
        ranked, found = self.ranked, list[Round]()
        keep, cost = torch.ones(len(ranked.units), dtype=torch.bool), cost_of(self.sizes)
        own, folder = [identity(ranked), _lasting(self.how)], self.folder
        state = State(folder and folder / SCORES, own, whole=WHOLE)
        by = [*own, PER_WEIGHT] if ranked.mixed else own
        learning = State(
            folder and folder / GATES / f"{count}-{self.how.epochs}", by, whole=WHOLE
        )  # refuses before scores are made
        for number in range(count):
            name = f"scores, round {number + 1} of {count}" if count > 1 else "scores"
            with self.stage(name) as tell:
                if self.how.name in MEASURED:
                    say(tell, unit="tokens")
                    scores = self._measured(tell)
                else:
                    say(tell, unit="batches")
                    scores = scored(ranked, keep, self.how, state, tell)
            found.append(Round(scores, 0, cost=cost))
            order = order_of(found, self.rank)
            kept = prefix(order, self.sizes, 1 - (number + 1) / count) if number + 1 < count else 0
            found[-1] = Round(scores, kept, cost=cost)
            keep = self.kept(order, kept)
        if self.how.epochs:
            with self.stage(GATES) as tell:
                say(tell, unit="steps")
                moves = learned(ranked, order_of(found, self.rank), self.sizes, self.how, learning, tell)
            found[-1] = replace(found[-1], moves=moves)
        return found

    def _measured(self, tell: Progress) -> Float[Tensor, "unit problem"]:
        """Return what an estimator that measures finds; what it did not measure is predicted."""
        plan, path = self.ranked.plan, self.folder and self.folder / "attribution.ledger"
        effects = attribute(
            self.ranked.decoder, plan.calibration, plan.question, self.how, ledger=path, on_progress=tell
        )
        change = effects.change_nats()
        if effects.predicted_nats is not None:
            change = torch.where(change.isnan(), effects.predicted_nats, change)
        return self.ranked.effects(change)

    @cached_property
    def sizes(self) -> Float[Tensor, "unit"]:
        """What a share is one of: units, or weights where kinds are mixed."""
        own = self.ranked
        return own.weights if own.mixed else torch.ones(len(own.units), dtype=torch.float64)

    def kept(self, order: Int[Tensor, "unit"], count: int) -> Keep:
        """Return which units are among the first."""
        keep = torch.zeros(len(order), dtype=torch.bool)
        keep[order[:count]] = True
        return keep

    def size(self, order: Int[Tensor, "unit"], rounds: Sequence[Round], book: Ledger | None) -> int:
        """Return how many of the first units it takes to keep the share, halving what is left each time.

        Raises:
            OptionError: nothing short of all units keeps it.
        """
        n, values = len(order), values_of(rounds, self.rank)
        below, above, largest = 0, n, (0, math.inf)
        turns = math.ceil(math.log2(max(n / max(1, n // STEPS), 1)))
        with self.stage("sizes") as tell:
            say(tell, unit="tokens")
            for turn in itertools.count():
                if above - below <= max(1, n // STEPS):
                    break
                middle = with_ties(order, values, (below + above) // 2)
                if middle >= above:
                    middle = (below + above) // 2
                trials = Trials(self.decided, book, partial(_within, tell, turn, turns))
                rise = self._rise(trials, order, middle)
                holds = rise <= self.limit and (self.rank == "signed" or -rise <= self.limit)
                below, above = (below, middle) if holds else (middle, above)
                largest = largest if holds else (middle, rise)
        if above == n:
            raise _none_keeps(self.share, n, *largest)
        return with_ties(order, values, above)

    @property
    def limit(self) -> float:
        """How many nats per token the share to keep is."""
        return -math.log(self.share)

    def _rise(self, trials: Trials, order: Int[Tensor, "unit"], count: int) -> float:
        whole, some = trials.nats([self.kept(order, len(order)), self.kept(order, count)]).mean(1)
        return float(some - whole)

    def run(
        self, rescore: int, book: Ledger | None
    ) -> tuple[list[Round], Int[Tensor, "unit"], int, tuple[Curve, Point]]:
        """Return what was scored, the order that comes of it, the size, and what is left at all sizes and at that one."""
        rounds = self.rounds(rescore)
        order = order_of(rounds, self.rank)
        size = self.size(order, rounds, book)
        return rounds, order, size, self.curve(order, size, book)

    def curve(self, order: Int[Tensor, "unit"], size: int, book: Ledger | None) -> tuple[Curve, Point]:
        """Measure circuits of MIB's sizes, and the one that was chosen."""
        total, weights = self.sizes.sum(), self.ranked.weights
        counts = [(share, prefix(order, self.sizes, share)) for share in SHARES]
        counts.append((float(self.sizes[order[:size]].sum() / total), size))
        keeps = [self.kept(order, count) for _, count in counts]
        with self.stage("curve") as tell:
            say(tell, unit="tokens")
            nats, kl = Trials(self.decided, book, tell).both(
                [*keeps, self.kept(order, len(order)), self.kept(order, 0)]
            )
        rows = [(share, count, round(float(weights[order[:count]].sum()))) for share, count in counts]
        ends = {"intact": nats[-2], "empty": nats[-1]}
        paired = self.decided.problems[0].instead is not None  # a guess is as good at both answers
        vocabulary = 1 if paired else self.decided.decoder.model.get_output_embeddings().weight.shape[0]
        found = curve(rows[:-1], nats[:-3], kl[:-3], ends, vocabulary)
        return found, curve(rows[-1:], nats[-3:-2], kl[-3:-2], ends, vocabulary).points[0]

    def described(self, rescore: int, **told: Any) -> dict[str, Any]:
        """Return what a record says of the way it was made."""
        return {
            "model": self.ranked.decoder.name,
            "question": asdict(self.ranked.plan.question),
            "estimator": asdict(self.how),
            "rank": self.rank,
            "rescore": rescore,
            "learn": self.how.epochs or 0,
            "keep": self.share,
            "sizes_of": "weights" if self.ranked.mixed else "units",
            "ordered_by": PER_WEIGHT if self.ranked.mixed else "score",
            "problems": {"scored": len(self.ranked.problems), "decided": len(self.decided.problems)},
            "calibration_fingerprint": self.ranked.fingerprint(),
            "decide_fingerprint": self.decided.fingerprint(),
            "method_version": METHOD_VERSION,
            "versions": versions(),
            "git_commit": git_commit(),
            **told,
        }


def _within(tell: Progress, turn: int, turns: int, done: int, total: int) -> None:
    """Report a turn of several that take as long."""
    tell(min(turn * total + done, turns * total), max(turns, 1) * total)


def _none_keeps(share: float, total: int, units: int, rise: float) -> OptionError:
    """Return the error where even the largest circuit that was tried does not keep the share, by its rise in nats."""
    above, signed = rise < 0, ", or for the rank 'signed' (--rank), which takes what is above 1"
    return OptionError(
        f"no circuit short of all {total:,} units keeps {share:g} of the likelihood per token: {units:,} units keep "
        f"{math.exp(-rise):.3f}{', too far to the other side' if above else ''}: ask for a smaller share to keep (--keep)"
        f"{signed if above else ''}"
    )
