"""Where to measure next: the cells that settle the ranking of units most for their cost."""

import heapq
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalprune.attribution.uncertainty import TOP_SHARE, estimate, posterior
from causalprune.core import Effects

PILOT_SHARE = 3
"""Every third unit of a kind is measured first, on `PILOT_CELLS` sequences, to learn how wrong predictions are."""
PILOT_CELLS = 2
NEIGHBOURS = 12
"""Units on each side whose distance says how densely the ranking is populated."""


@dataclass(frozen=True, eq=False)
class Allocation:
    """What cells cost: layer of each unit, tokens of each sequence, depth of the model; and the seed."""

    layers: Int[Tensor, "unit"]
    lengths: Int[Tensor, "sequence"]
    depth: int
    seed: int


def next_cells(effects: Effects, plan: Allocation, room: float) -> list[tuple[int, int]]:
    """Return cells (unit, sequence) to measure next, worth `room` tokens at most.

    Every unit sees the sequences in one random order. A cell is worth the drop of its unit's variance,
    weighed by how densely units lie around it: ranks are lost where neighbours are close.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(plan.lengths), generator=generator).tolist()
    measured = ~effects.change_nats().isnan()
    share = (plan.depth - plan.layers).double() / plan.depth
    touched = set(measured.any(0).nonzero()[:, 0].tolist())
    spent, chosen = 0.0, list[tuple[int, int]]()

    def afford(unit: int, at: int) -> bool:
        nonlocal spent
        sequence = order[at]
        cost = float(plan.lengths[sequence] * share[unit])
        if sequence not in touched:  # its intact pass and walk
            cost += 2.0 * float(plan.lengths[sequence])
        if spent + cost > room:
            return False
        spent += cost
        touched.add(sequence)
        chosen.append((unit, sequence))
        return True

    if not bool(measured.any()):
        for unit in _pilot(effects, generator):
            # Up to the first that is too dear: what a unit has is always the first of the order.
            all(afford(unit, at) for at in range(min(PILOT_CELLS, len(order))))
        return chosen
    counts, n = measured.sum(1).double(), len(order)
    assert effects.predicted_nats is not None
    counts[effects.predicted_nats.isnan().any(1)] = n  # experts that no token reaches
    known, density = posterior(effects), _density(effects)

    def gain(unit: int) -> float:
        cells = torch.stack([counts[unit].clamp_min(1e-9), counts[unit] + 1])
        now, then = known.variance_at(cells, n, unit)
        return float(density[unit] ** 2 * (now - then) / share[unit])

    heap = [(-gain(unit), unit) for unit in range(len(counts)) if counts[unit] < n]
    heapq.heapify(heap)
    while heap:
        _, unit = heapq.heappop(heap)
        if not afford(unit, int(counts[unit])):
            break
        counts[unit] += 1
        if counts[unit] < n:
            heapq.heappush(heap, (-gain(unit), unit))
    return chosen


def settled(effects: Effects) -> float:
    """Return how much of the top fifth of the units is right, in expectation over what was not measured.

    A unit counts with the probability that its effect on these calibration sequences lies above the border.
    """
    if not bool(effects.masked_nats.isfinite().any()):
        return 0.0
    values, deviation = estimate(effects).value.nan_to_num(0.0), posterior(effects).variance.sqrt()
    k = max(1, round(TOP_SHARE * len(values)))
    ranked = values.sort(descending=True).values
    border = (ranked[k - 1] + ranked[min(k, len(ranked) - 1)]) / 2
    top = values.topk(k).indices
    above = torch.special.ndtr((values - border)[top] / deviation[top].clamp_min(1e-300))
    return float(above.mean())


def _pilot(effects: Effects, generator: torch.Generator) -> list[int]:
    """Return a random third of the units of every kind."""
    chosen = []
    for kind in dict.fromkeys(unit.kind for unit in effects.units):
        own = [i for i, unit in enumerate(effects.units) if unit.kind == kind]
        picked = torch.randperm(len(own), generator=generator)[: max(3, len(own) // PILOT_SHARE)]
        chosen += [own[i] for i in sorted(picked.tolist())]
    return chosen


def _density(effects: Effects) -> Float[Tensor, "unit"]:
    """Return units per nat around each unit, within its kind, from the distance of its neighbours."""
    values, found = (
        estimate(effects).value.nan_to_num(0.0),
        torch.zeros(len(effects.units), dtype=torch.float64),
    )
    for kind in dict.fromkeys(unit.kind for unit in effects.units):
        own = torch.tensor([i for i, unit in enumerate(effects.units) if unit.kind == kind])
        ranked = values[own].sort().values
        rank = values[own].argsort().argsort()
        low, high = (rank - NEIGHBOURS).clamp_min(0), (rank + NEIGHBOURS).clamp_max(len(own) - 1)
        width = (ranked[high] - ranked[low]).clamp_min(1e-12)
        found[own] = (high - low).double() / width / len(own)
    return found
