"""Gates that are learned: units move up and down their order, so that the model without the last of them predicts as before.

A score is about one unit and a model that is otherwise whole, or about all units together; what a circuit of a given size keeps
depends on which units go together. So closed units are let in and open ones let out by the slopes of the divergence at their
gates, straight through the step from place to gate (Bengio et al. 2013, arXiv 1308.3432; edges of circuits in arXiv
2406.16778), at sizes drawn anew for every problem: one order for all sizes.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalprune.attribution import LEAST, Estimator
from causalprune.circuits.behaviour import Behaviour
from causalprune.circuits.ranking import places, prefix
from causalprune.core import ModelError, Progress, State
from causalprune.interventions import Following, LayerInputs, gate_slopes, last_hidden, selected

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
"""Divergence in nats a target token at which slopes count half: where next to nothing is lost, they say nothing of removal."""


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
    Costs three forward passes an epoch, and one; by `resample`, whose donors are in the batch, one of the batch more a step.

    Raises:
        ModelError: a slope is not finite.
    """
    parts, generator = _parts(of), torch.Generator().manual_seed(how.seed)
    start, total = places(order), (how.epochs or 0) * len(parts)
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
    intact = [last_hidden(of.decoder, batch) for batch in of.plan.groups] if known["steps"] < total else []
    for number in range(int(known["steps"]), total):
        part = parts[number % len(parts)]
        now = (start + moves).argsort(descending=True, stable=True)
        shares = torch.empty(sum(len(rows) for rows in part.values())).uniform_(*SIZES, generator=generator)
        first = torch.tensor([prefix(now, sizes, share) for share in shares.tolist()])  # that does not stay
        after = now.argsort() - first[:, None]
        slopes, lost = _slopes(of, part, intact, after < 0)
        if not bool(slopes.isfinite().all()):
            raise ModelError(
                f"step {number + 1} of learning gates: slopes at gates are not finite; ask for no epochs (--learn 0)"
            )
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


def _parts(of: Behaviour) -> list[dict[int, list[int]]]:
    """Return the rows of batches that each step sees: as many problems in all, without wrong answers, long ones together."""
    groups, n = of.plan.groups, len(of.problems)
    places_ = [
        (number, row) for number, own in enumerate(groups) for row, i in enumerate(own.indices) if i < n
    ]
    steps, found = math.ceil(n / AT_ONCE), list[dict[int, list[int]]]()
    for step in range(steps):
        found.append({})
        for number, row in places_[step * n // steps : (step + 1) * n // steps]:
            found[-1].setdefault(number, []).append(row)
    return found


def _slopes(
    of: Behaviour, part: dict[int, list[int]], intact: list[LayerInputs], keeps: Bool[Tensor, "problem unit"]
) -> tuple[Float[Tensor, "unit problem"], Float[Tensor, "problem"]]:
    """Return the slopes of each problem's divergence from the intact model at the gates of all units, where some are closed, and itself.

    The divergence is a mean over target tokens.
    """
    found, lost, done, after = [], [], 0, len(of.decoder.layers)
    for number, rows in part.items():
        whole = of.plan.groups[number]
        batch, teacher = selected(whole, rows), intact[number].rows(after, rows, whole.tokens)
        each = [of.gates(keep) for keep in keeps[done : done + len(rows)]]
        gates = {site: torch.stack([own[site] for own in each]) for site in of.places}
        asked = Following(of.decoder, batch, teacher)
        units, instead = list(of.plan.units.values()), of.instead(whole, rows)
        found.append(gate_slopes(of.decoder, batch, units, asked, gate=gates, instead=instead))
        lost.append(asked.nats / batch.is_target[:, 1:].sum(1))
        done += len(rows)
    return torch.cat(found, 1), torch.cat(lost)
