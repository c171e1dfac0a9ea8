"""Gates that are learned: units move up and down their order, so that the model without the last of them does as before.

A score is about one unit and a model that is otherwise whole, or about all units together; what a circuit of a given size keeps
depends on which units go together. So closed units are let in and open ones let out by the slopes of what is lost at their
gates, straight through the step from place to gate (Bengio et al. 2013, arXiv 1308.3432; edges of circuits in arXiv
2406.16778), at sizes drawn anew for every problem: one order for all sizes.

As before is what the question's effect says: by `kl` all that is predicted, by `ce` the loss of every problem, or by how much
its right answer is likelier than its wrong one.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalprune.attribution import LEAST, Estimator
from causalprune.circuits.behaviour import Behaviour, Trials
from causalprune.circuits.ranking import cost_of, places, prefix
from causalprune.core import Batch, ModelError, Progress, State
from causalprune.interventions import Following, Losing, gate_slopes, last_hidden, selected

AT_ONCE = 6
"""Problems of a step, at most; the number of steps does not depend on what a forward pass holds."""
RATE = 0.04
"""Share of the order by which a unit whose slope is the root mean square of all moves in a step, at first; falls to zero."""
MEMORY = 0.8
"""Share of a step's direction that the next one goes on with."""
NEAR = 0.25
"""Share of the order within which a unit moves, on both sides of the last that stays: further off, a slope says nothing of its removal."""
SIZES = 0.05, 0.95
"""Between which shares circuits are drawn."""
LITTLE = 0.02
"""Nats a target token away from the intact model at which slopes count half: where next to nothing is lost, they say nothing of removal."""


def learned(
    of: Behaviour,
    order: Int[Tensor, "unit"],
    sizes: Float[Tensor, "unit"],
    how: Estimator,
    state: State,
    tell: Progress,
) -> Float[Tensor, "unit"]:
    """Return by how much every unit moves up from its place in an `order` of units of these `sizes`, as a share of the order.

    Goes through the problems in the estimator's epochs, with its seed. Goes on from the `state` of a stopped run, bit for bit.
    Costs three forward passes over all sequences an epoch, and one; by `resample`, whose donors are in the batch, one of the batch more a step.

    Raises:
        ModelError: a slope is not finite.
    """
    steps, generator = _steps(of), torch.Generator().manual_seed(how.seed)
    start, cost, total = places(order), cost_of(sizes), (how.epochs or 0) * len(steps)
    known = state.values.pop("moves", None) or {
        "steps": 0,
        "moves": torch.zeros(len(order), dtype=torch.float64),
        "last": torch.zeros(len(order), dtype=torch.float64),
        "largest": 0.0,
        "generator": generator.get_state(),
    }
    moves: Tensor
    moves, last, largest = known["moves"].clone(), known["last"].clone(), float(known["largest"])
    generator.set_state(known["generator"])
    if known["steps"] >= total:
        return moves
    away = _departure(of, cost)
    for number in range(int(known["steps"]), total):
        problems = steps[number % len(steps)]
        now = (start + moves).argsort(descending=True, stable=True)
        shares = torch.empty(len(problems)).uniform_(*SIZES, generator=generator)
        first = torch.tensor([prefix(now, sizes, share) for share in shares.tolist()])  # that does not stay
        after = now.argsort() - first[:, None]
        slopes, lost = away(problems, after < 0)
        if not bool(slopes.isfinite().all()):
            raise ModelError(
                f"step {number + 1} of learning gates: slopes at gates are not finite; ask for no epochs (--learn 0)"
            )
        slopes /= cost[:, None]
        size = slopes.square().mean(0).sqrt()
        largest = max(largest, float(size.max()))
        slopes *= (
            lost / (lost + LITTLE) / size.clamp_min(LEAST * largest).clamp_min(torch.finfo(size.dtype).tiny)
        )
        slopes *= (after.abs() <= NEAR * len(order)).T
        last = MEMORY * last + (1 - MEMORY) * slopes.mean(1)
        moves -= RATE * (1 + math.cos(math.pi * (number + 1) / total)) / 2 * last
        if state.due() or number + 1 == total:
            own = {"moves": moves, "last": last, "largest": largest, "generator": generator.get_state()}
            state.flush(moves=own | {"steps": number + 1})
        tell(number + 1, total)
    return moves


Departure: TypeAlias = Callable[
    [list[int], Bool[Tensor, "problem unit"]], tuple[Float[Tensor, "unit problem"], Float[Tensor, "problem"]]
]
"""From problems and the units that stay, how far each problem is from the intact model, and the slopes of that at all gates."""


def _steps(of: Behaviour) -> list[list[int]]:
    """Return the problems that each step sees: as many in all, long ones together."""
    n = len(of.problems)
    order = [i for batch in of.plan.groups for i in batch.indices if i < n]
    steps = math.ceil(n / AT_ONCE)
    return [order[step * n // steps : (step + 1) * n // steps] for step in range(steps)]


def _departure(of: Behaviour, cost: Float[Tensor, "unit"]) -> Departure:
    """Return what measures how far problems are from the intact model, in nats per target token, with units of this cost.

    It takes a pass over all. By `kl` that is the divergence at their right answers. By `ce` it is the change of their loss, less that of wrong answers, to
    either side.
    """
    groups = of.plan.groups
    if of.plan.question.effect == "kl":
        intact, after = [last_hidden(of.decoder, batch) for batch in groups], len(of.decoder.layers)

        def follow(number: int, rows: list[int], batch: Batch) -> Following:
            return Following(of.decoder, batch, intact[number].rows(after, rows, groups[number].tokens))

        def diverged(problems: list[int], keeps: Tensor) -> tuple[Tensor, Tensor]:
            slopes, nats = _slopes(of, problems, keeps, follow)
            return slopes, nats / torch.tensor([of.problems[i].target_tokens for i in problems])

        return diverged
    n, before = len(of.problems), Trials(of).nats([torch.ones(len(of.units), dtype=torch.bool)])[0]
    tokens = torch.tensor([example.target_tokens for example in of.plan.calibration.examples])

    def lose(_: int, __: list[int], batch: Batch) -> Losing:
        return Losing(of.compared(batch))

    def changed(problems: list[int], keeps: Tensor) -> tuple[Tensor, Tensor]:
        slopes, nats = (own / tokens[problems] for own in _slopes(of, problems, keeps, lose))
        if len(tokens) > n:
            wrong = [i + n for i in problems]
            others = (own / tokens[wrong] for own in _slopes(of, wrong, keeps, lose))
            slopes, nats = (own - other for own, other in zip((slopes, nats), others, strict=True))
        change = nats - before[problems]
        return _to_either_side(slopes, change, keeps, cost), change.abs()

    return changed


def _to_either_side(
    slopes: Float[Tensor, "unit problem"],
    change: Float[Tensor, "problem"],
    keeps: Bool[Tensor, "problem unit"],
    cost: Float[Tensor, "unit"],
) -> Float[Tensor, "unit problem"]:
    """Return by how much the size of a change rises between a closed gate and an open one, from slopes of the change itself.

    Where a circuit does better than the model, as what hinders is not in yet, the slope of the size alone would throw out what the
    behaviour hangs on, which is worth most. So what carries a change past zero counts by where it ends, and for its cost no unit
    falls faster than the root mean square of all.
    """
    size = change.abs()
    found = torch.where(keeps.T, size - (change - slopes).abs(), (change + slopes).abs() - size)
    cost = cost.to(found)[:, None]
    return found.minimum(cost * (found / cost).square().mean(0).sqrt())


def _slopes(
    of: Behaviour,
    sequences: list[int],
    keeps: Bool[Tensor, "sequence unit"],
    ask: Callable[[int, list[int], Batch], Following | Losing],
) -> tuple[Float[Tensor, "unit sequence"], Float[Tensor, "sequence"]]:
    """Return the slopes of what is asked of each sequence at the gates of all units, where some are closed, and its nats."""
    by: dict[int, list[int]] = {}
    rows = {
        i: (number, row) for number, own in enumerate(of.plan.groups) for row, i in enumerate(own.indices)
    }
    for at, i in enumerate(sequences):
        by.setdefault(rows[i][0], []).append(at)
    found, nats = [], []
    for number, own in by.items():
        whole, chosen = of.plan.groups[number], [rows[sequences[at]][1] for at in own]
        batch, each = selected(whole, chosen), [of.gates(keeps[at]) for at in own]
        gates = {site: torch.stack([one[site] for one in each]) for site in of.places}
        asked, units = ask(number, chosen, batch), list(of.plan.units.values())
        found.append(
            gate_slopes(of.decoder, batch, units, asked, gate=gates, instead=of.instead(whole, chosen))
        )
        nats.append(asked.nats)
    back = torch.tensor([at for own in by.values() for at in own]).argsort()
    return torch.cat(found, 1)[:, back], torch.cat(nats)[back]
