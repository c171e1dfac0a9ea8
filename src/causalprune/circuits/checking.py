"""Whether a circuit is more than any set of its size: controls, what is left without it, and what it leaves out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalprune.attribution import Estimator, Question
from causalprune.circuits.behaviour import Behaviour, Keep, Trials, behaviour, scored
from causalprune.circuits.curves import summed_up
from causalprune.circuits.finding import halves, ledger
from causalprune.circuits.hypotheses import Q, better_than, equivalence, independence, minimality
from causalprune.circuits.ranking import prefix
from causalprune.circuits.records import CIRCUIT, Circuit, carried, save_circuit
from causalprune.core import Calibration, Decoder, MismatchError, Progress, Stage, State, Unit, bars, say

NECESSARY = 0.1
"""Share of the units (or weights) that go where it is asked what is left without the first of them."""
SUBSETS, GREEDY, BEST = 20, 5, 50
"""Random subsets of the members that are left out, and units of the greedy one among the best."""
RANDOM = 100
"""Random circuits, and random units, of every test."""
SAMPLE = 50
"""Members whose own part is tested, at most; all of them where they are heads."""


@dataclass(frozen=True)
class Checks:
    """What a circuit is compared with: random ones (`controls`; None: 100, or 20 where they are not of heads), on how many problems.

    With `tests`, the hypotheses of `hypotheses` are tested too.
    """

    controls: int | None = None
    problems: int = 16
    tests: bool = False

    def count(self, kinds: Sequence[str]) -> int:
        """Return the number of random circuits."""
        return self.controls if self.controls is not None else 100 if set(kinds) == {"head"} else 20

    def passes(self, kinds: Sequence[str], members: int) -> int:
        """Return how often the problems go through the model, slopes included; at most."""
        own = self.count(kinds) + 2 * SUBSETS + 8 * GREEDY + 2
        tested = members if set(kinds) == {"head"} else min(members, SAMPLE)
        return own + self.tests * (2 * RANDOM + tested + RANDOM)


@dataclass(frozen=True, eq=False)
class _Bench:
    """A circuit on problems, and what has to be known to compare others with it."""

    of: Behaviour
    circuit: Circuit
    trials: Trials
    generator: torch.Generator

    def keep(self, count: int | None = None) -> Keep:
        """Return which units are among the first; those of the circuit without a number."""
        found = torch.zeros(len(self.circuit.units), dtype=torch.bool)
        found[self.circuit.order[: self.circuit.size if count is None else count]] = True
        return found

    def random(self, like: Keep, count: int) -> list[Keep]:
        """Return `others_like` a set."""
        return others_like(self.circuit.units, like, self.generator, count)

    def nats(self, keeps: Sequence[Keep]) -> Tensor:
        """Return the loss of each, mean over the problems."""
        found: Tensor = self.trials.nats(keeps).mean(1)
        return found

    def faithfulness(self, keeps: Sequence[Keep]) -> Tensor:
        """Return f of each."""
        intact, empty, *own = self.nats([self.keep(len(self.circuit.units)), self.keep(0), *keeps])
        found: Tensor = (empty - torch.stack(own)) / (empty - intact)
        return found


def others_like(units: Sequence[Unit], like: Keep, generator: torch.Generator, count: int) -> list[Keep]:
    """Return other sets as `random_like` draws them; none where there is no other."""
    drawn = (random_like(units, like, generator) for _ in range(count))
    return [own for own in drawn if not torch.equal(own, like)]


def random_like(units: Sequence[Unit], like: Keep, generator: torch.Generator) -> Keep:
    """Return another random set of as many units of every kind in every layer as `alike` has them; the same if there is no other."""
    groups = [torch.tensor(own) for own in alike(units).values()]
    free = any(0 < int(like[own].sum()) < len(own) for own in groups)
    while True:
        found = torch.zeros_like(like)
        for own in groups:
            found[own[torch.randperm(len(own), generator=generator)[: int(like[own].sum())]]] = True
        if not (free and torch.equal(found, like)):
            return found


def alike(units: Sequence[Unit]) -> dict[tuple[int | None, str], list[int]]:
    """Return the numbers of units by layer and kind; where no layer has two of a kind, those of all layers (None) together."""
    count = Counter((unit.layer, unit.kind) for unit in units)
    several = {kind for (_, kind), number in count.items() if number > 1}
    groups: dict[tuple[int | None, str], list[int]] = {}
    for number, unit in enumerate(units):
        groups.setdefault((unit.layer if unit.kind in several else None, unit.kind), []).append(number)
    return groups


def asked(circuit: Circuit) -> tuple[Question, Estimator]:
    """Return what a circuit answers, and how it was estimated."""
    question, how = (dict(circuit.description[key]) for key in ("question", "estimator"))
    question["units"] = tuple(question["units"])
    return Question(**question), Estimator(
        **{**how, "gates": tuple(how["gates"]), "share": tuple(how["share"])}
    )


def examined(
    circuit: Circuit,
    decoder: Decoder,
    calibration: Calibration,
    checks: Checks = Checks(),
    *,
    folder: Path | str | None = None,
    stage: Stage | None = None,
) -> Circuit:
    """Return a circuit with its `checks`, and its `tests` where they are asked for; `calibration` is what it was found on.

    They are written where the `folder` has that circuit.

    Raises:
        MismatchError: the circuit is of another model, or was found on another calibration.
    """
    question, how = asked(circuit)
    scored = circuit.description["calibration_fingerprint"]
    tries = (behaviour(decoder, own.examples, question, how) for own in (calibration, halves(calibration)[0]))
    ranked = next((own for own in tries if own.fingerprint() == scored), None)
    if ranked is None or ranked.plan.model_fingerprint != circuit.model_fingerprint:
        raise MismatchError(
            "the circuit was found in another model, or on another calibration: find it again"
        )
    whole = behaviour(decoder, circuit.problems, question, how, ranked.mean)
    few, stage = whole.first(checks.problems), stage or bars
    kinds = list(dict.fromkeys(unit.kind for unit in circuit.units))
    with ledger(ranked, whole, how, folder) as book:

        def bench(of: Behaviour, tell: Progress, seed: int) -> _Bench:
            say(tell, unit="tokens")
            return _Bench(of, circuit, Trials(of, book, tell), torch.Generator().manual_seed(seed))

        with stage("necessity") as tell:
            found = {"problems": len(few.problems), "necessity": _necessity(bench(whole, tell, 1))}
        with stage("controls") as tell:
            found["controls"] = _controls(bench(few, tell, 2), checks.count(kinds))
        with stage("completeness") as tell:
            found["completeness"] = _completeness(bench(few, tell, 3))
        tests: dict[str, Any] = circuit.tests
        if checks.tests:
            with stage("tests") as tell:
                tests = _tested(bench(few, tell, 4), bench(whole, tell, 4))
    made = replace(circuit, checks=found, tests=tests)
    if folder is not None and (held := carried(made, path := Path(folder) / CIRCUIT)):
        save_circuit(held, path)
    return made


def _necessity(bench: _Bench) -> dict[str, Any]:
    """Return what closing the first tenth of the units costs, and what random ones that are `alike` do, if there are others."""
    mixed = len({unit.kind for unit in bench.circuit.units}) > 1
    sizes = bench.circuit.weights if mixed else torch.ones_like(bench.circuit.weights)
    first = bench.keep(prefix(bench.circuit.order, sizes, NECESSARY))
    keeps = [torch.ones_like(first), ~first, *(~other for other in bench.random(first, 5))]
    nats = bench.trials.nats(keeps)
    return {
        "share": float(sizes[first].sum() / sizes.sum()),
        "units": int(first.sum()),
        "nats": asdict(summed_up(nats[1] - nats[0])),
        "random_nats": asdict(summed_up(nats[2:].mean(0) - nats[0])) if len(nats) > 2 else None,
    }


def _controls(bench: _Bench, count: int) -> dict[str, Any]:
    """Return how the circuit compares with random ones that are `alike`; worse is further from the model, signed a larger loss."""
    own = bench.keep()
    others = bench.random(own, count)
    if not others:
        return {"count": 0, "asked": count}
    keeps = [torch.ones_like(own), own, *others]
    nats, f = bench.nats(keeps), bench.faithfulness(keeps[1:])
    rises = nats[1:] - nats[0]
    quantiles = rises[1:].quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    far = rises if bench.circuit.description["rank"] == "signed" else rises.abs()
    return {
        "count": count,
        "nats": float(rises[0]),
        "random_nats": quantiles.tolist(),
        "faithfulness": float(f[0]),
        "random_faithfulness": float(f[1:].mean()),
        "worse": float((far[1:] > far[0]).double().mean()),
    }


def _completeness(bench: _Bench) -> dict[str, Any]:
    """Return |f(C∖K) − f(M∖K)| for random sets K of members, and for one that is chosen to make it large."""
    own, n = bench.keep(), len(bench.circuit.units)
    outs = []
    for _ in range(SUBSETS):
        chosen = torch.rand(n, generator=bench.generator) < 0.5
        outs.append(own & chosen)
    greedy = _greedy(bench)
    f = bench.faithfulness([keep & ~out for out in (*outs, greedy) for keep in (own, torch.ones_like(own))])
    gaps = (f[::2] - f[1::2]).abs()
    named = [bench.circuit.units[number] for number in greedy.nonzero()[:, 0].tolist()]
    return {
        "random_mean": float(gaps[:-1].mean()),
        "random_max": float(gaps[:-1].max()),
        "greedy": float(gaps[-1]),
        "greedy_units": [[unit.layer, unit.index, unit.kind] for unit in named],
    }


def _greedy(bench: _Bench) -> Keep:
    """Return a few of the best members whose removal tells circuit and model apart, each chosen by slopes, then measured."""
    how, best = Estimator("gradient", draws=0), bench.circuit.order[: min(BEST, bench.circuit.size)]
    plan, own = bench.of.plan, bench.keep()
    of = replace(bench.of, plan=replace(plan, question=replace(plan.question, effect="ce")))  # as gaps are
    out = torch.zeros_like(own)
    for _ in range(min(GREEDY, len(best) - 1)):
        both = [own & ~out, ~out]
        gap = torch.sub(*bench.nats(both))
        rises = [scored(of, keep, how, State()).mean(1) for keep in both]
        moved = (gap + rises[0] - rises[1]).abs()[best].masked_fill(out[best], -1).nan_to_num(nan=-1)
        out[best[int(moved.argmax())]] = True
    return out


def _tested(few: _Bench, whole: _Bench) -> dict[str, Any]:
    """Test what Shi et al. (2024, arXiv 2410.13032) ask of a circuit."""
    own = few.keep()
    sets = [own, *few.random(own, RANDOM)]
    nats = few.nats([torch.ones_like(own), *sets, *(~other for other in sets)])
    alone, without = (nats[1:] - nats[0]).abs().unflatten(0, (2, -1))
    values = whole.trials.nats([torch.ones_like(own), whole.keep(), ~whole.keep()])
    return {
        "q": Q,
        "sufficiency": better_than(-alone[0], -alone[1:]),
        "partial_necessity": better_than(without[0], without[1:]),
        "equivalence": equivalence(values[0], values[1]),
        "independence": independence(values[0], values[2]),
        "minimality": _minimality(few),
    }


def _minimality(bench: _Bench) -> dict[str, Any]:
    """Ask of members whether each does more in the circuit than a random unit that is added to it."""
    own, circuit = bench.keep(), bench.circuit
    members = circuit.order[: circuit.size]
    if len(members) > SAMPLE and any(circuit.units[number].kind != "head" for number in members.tolist()):
        members = members[torch.randperm(len(members), generator=bench.generator)[:SAMPLE]]
    outside = (~own).nonzero()[:, 0]
    outside = outside[torch.randperm(len(outside), generator=bench.generator)[:RANDOM]]
    keeps = [own]
    for numbers, value in ((members, False), (outside, True)):
        for number in numbers.tolist():
            keep = own.clone()
            keep[number] = value
            keeps.append(keep)
    nats = bench.nats(keeps)
    moved = (nats[1:] - nats[0]).abs()
    found = minimality(moved[: len(members)], moved[len(members) :])
    named = [circuit.units[int(members[at])] for at in found.pop("spare")]
    return {**found, "spare": [[unit.layer, unit.index, unit.kind] for unit in named]}
