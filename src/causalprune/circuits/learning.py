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

from causalprune.attribution import Estimator
from causalprune.circuits.behaviour import LEAST, Behaviour
from causalprune.circuits.ranking import places, prefix
from causalprune.core import Batch, Progress, State
from causalprune.interventions import (
    LayerInputs,
    Site,
    divergence_slope,
    entered_at,
    gated,
    last_hidden,
    target_logits,
    targets,
)

RATE = 0.04
"""Share of the order by which a unit whose slope is the root mean square of all moves in a step, at first; falls to zero."""
MEMORY = 0.8
"""Share of a step's direction that the next one goes on with."""
NEAR = 0.25
"""Share of the order within which a unit moves, on both sides of the last that stays: further off, a slope says nothing of its removal."""
SIZES = 0.05, 0.95
"""Between which shares circuits are drawn."""


def learned(
    of: Behaviour,
    order: Int[Tensor, "unit"],
    sizes: Float[Tensor, "unit"],
    how: Estimator,
    state: State,
    tell: Progress,
) -> Float[Tensor, "unit problem"]:
    """Return by how much each problem moves every unit up from its place in an `order` of units of these `sizes`.

    Goes through the problems in the estimator's epochs, with its seed. The mean over problems is the whole move, in shares of the order. Goes on from the `state` of a stopped run, bit for bit.
    Costs three forward passes an epoch, and one.
    """
    n, generator = len(of.problems), torch.Generator().manual_seed(how.seed)
    groups = [own for own in of.plan.groups if min(own.indices) < n]  # those of wrong answers alone are out
    start, total = places(order), (how.epochs or 0) * len(groups)
    known = state.values.pop("learned", None) or {
        "steps": 0,
        "moves": torch.zeros(len(order), n),
        "last": torch.zeros(len(order), n),
        "largest": 0.0,
        "generator": generator.get_state(),
    }
    moves, last, largest = known["moves"].clone(), known["last"].clone(), float(known["largest"])
    generator.set_state(known["generator"])
    intact = [last_hidden(of.decoder, batch) for batch in groups] if known["steps"] < total else []
    for number in range(int(known["steps"]), total):
        at = number % len(groups)
        now = (start + moves.double().mean(1)).argsort(descending=True, stable=True)
        shares = torch.empty(len(groups[at].tokens)).uniform_(*SIZES, generator=generator)
        first = torch.tensor([prefix(now, sizes, share) for share in shares.tolist()])  # that does not stay
        after = now.argsort() - first[:, None]
        keeps = after < 0
        slopes = _slopes(of, groups[at], intact[at], keeps)
        size = slopes.square().mean(0).sqrt()
        largest = max(largest, float(size.max()))
        slopes /= size.clamp_min(LEAST * largest).clamp_min(torch.finfo(size.dtype).tiny)
        slopes *= (after.abs() <= NEAR * len(order)).T
        rows = [row for row, index in enumerate(groups[at].indices) if index < n]
        last *= MEMORY
        last[:, [groups[at].indices[row] for row in rows]] += (1 - MEMORY) * n / len(rows) * slopes[:, rows]
        moves -= RATE * (1 + math.cos(math.pi * (number + 1) / total)) / 2 * last
        if state.due() or number + 1 == total:
            own = {"moves": moves, "last": last, "largest": largest, "generator": generator.get_state()}
            state.flush(learned=own | {"steps": number + 1})
        tell(number + 1, total)
    found: Tensor = moves.double()
    return found


def _slopes(
    of: Behaviour, batch: Batch, intact: LayerInputs, keeps: Bool[Tensor, "batch unit"]
) -> Float[Tensor, "unit batch"]:
    """Return the slopes of each sequence's divergence from the intact model at the gates of all units, where some are closed."""
    wanted, after = targets(batch), len(of.decoder.layers)
    gates: dict[Site, Tensor] = {}
    for site, (index, owner) in of.places.items():
        gates[site] = torch.ones(len(keeps), of.plan.sites[site])
        gates[site][:, index] = keeps[:, owner].float()
        gates[site].requires_grad_()
    with torch.no_grad(), entered_at(of.decoder, after, intact):
        teacher = target_logits(of.decoder, batch, wanted)
    with torch.enable_grad(), gated(of.decoder, gates, of.instead(batch)):
        logits = target_logits(of.decoder, batch, wanted)
    logits.backward(divergence_slope(teacher, logits.detach(), 1.0), inputs=list(gates.values()))
    found = torch.zeros(keeps.shape[1], len(keeps))
    for site, (index, owner) in of.places.items():
        slope = gates[site].grad
        assert slope is not None
        found.index_add_(0, owner, slope[:, index].T.float().cpu())
    return found
