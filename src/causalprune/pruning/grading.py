"""Graded interventions: what the task loses when one group of matrices alone is pruned, a little or a lot.

A group is a layer's attention or its MLP with all its experts. The answers are dose–response curves, from which
`allocation.graded_shares` makes budgets: groups that the task can spare lose more, the others less. Where a pattern says how
much a matrix loses, groups are smaller, and `allocation.dense_shares` chooses those that stay dense.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.core import Batch, Decoder, Layer, ModelError, Projection, State
from causalprune.interventions import (
    LayerInputs,
    capture,
    divergence,
    entered_at,
    run_layer,
    target_logits,
    targets,
)

DOSES = (0.6, 1.0, 1.4)
"""Sparsities at which a group is pruned, in multiples of the one that is wanted."""
MOST = 0.95
"""No group loses more, but where so much is wanted of all: then half of what that leaves may go."""
MLP = ("gate", "up", "down")
FUSED = 4
"""Groups of a layer where a pattern decides: matrices that inference engines fuse are sparse together or not at all."""

Trial: TypeAlias = Callable[[Projection, Sequence[float]], Sequence[Float[Tensor, "out in"]]]
"""Says what becomes of a matrix at every sparsity."""


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """Divergence from the intact model in nats per target token, by group and sparsity.

    `members[i]` are the names of the projections of group i, which has `sizes[i]` weights.
    """

    members: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    sparsities: tuple[float, ...]
    nats: Float[Tensor, "group dose"]


def doses(sparsity: float) -> tuple[float, ...]:
    """Return the sparsities to try for one that is wanted."""
    return tuple(min(dose * sparsity, max(MOST, (1 + sparsity) / 2)) for dose in DOSES)


@dataclass(frozen=True, eq=False)
class Experiment:
    """On what the divergence is measured, at which sparsities, and whether groups are what inference engines fuse."""

    batches: Sequence[Batch]
    sparsities: Sequence[float]
    fused: bool = False


def dose_response(
    decoder: Decoder,
    layers: Iterable[Layer],
    experiment: Experiment,
    pruned: Trial,
    state: State | None = None,
) -> DoseResponse:
    """Prune group after group, each alone and at every sparsity, and measure the divergence on the batches.

    `layers` yields the layers from the first that `untried` names, in order, each at a time when `pruned` can say what becomes of its
    matrices at every sparsity. The model is as it was after each trial. Every group is kept in the `state`, and not tried again.
    Costs `groups · sparsities` passes through the rest of the model for every layer, with two groups or, `fused`, up to four.

    Raises:
        ModelError: a divergence is not finite; it is not kept.
    """
    state = state or State()
    rows = state.values.setdefault("trials", [])
    groups = [group for layer in decoder.layers for group in groups_of(layer, fused=experiment.fused)]
    if len(rows) < len(groups):
        for row in _trials(decoder, layers, experiment, pruned, len(rows)):
            if not all(map(math.isfinite, row)):
                raise ModelError(
                    f"divergences where {groups[len(rows)][0].name} is pruned are not finite: look for broken weights, or "
                    "begin again in another output with --dtype float32, or without +graded"
                )
            rows.append(row)
            state.keep(trials=rows)
    members = tuple(tuple(p.name for p in group) for group in groups)
    sizes = tuple(sum(p.size for p in group) for group in groups)
    return DoseResponse(members, sizes, tuple(experiment.sparsities), torch.tensor(rows, dtype=torch.float64))


def untried(decoder: Decoder, experiment: Experiment, state: State) -> int:
    """Return the first layer with a group that the `state` knows no trials of."""
    left = len(state.values.get("trials", []))
    for layer in decoder.layers:
        left -= len(groups_of(layer, fused=experiment.fused))
        if left < 0:
            return layer.index
    return len(decoder.layers)


def _trials(
    decoder: Decoder, layers: Iterable[Layer], experiment: Experiment, pruned: Trial, known: int
) -> Iterator[list[float]]:
    """Yield the divergences of group after group, all but the first that are `known`."""
    batches, sparsities = experiment.batches, experiment.sparsities
    wanted = [targets(batch) for batch in batches]
    with torch.no_grad():
        intact = [target_logits(decoder, *pair) for pair in zip(batches, wanted, strict=True)]
    n = sum(len(logits) for logits in intact)
    inputs: list[LayerInputs] = []

    def measured(layer: Layer) -> float:
        total = 0.0
        for batch, own, at, teacher in zip(batches, inputs, wanted, intact, strict=True):
            with torch.no_grad(), entered_at(decoder, layer.index, own):
                logits = target_logits(decoder, batch, at)
            total += float(divergence(teacher, torch.arange(len(teacher)), logits).double().sum())
        return total / n

    for layer in layers:
        if not inputs:
            number = sum(len(groups_of(own, fused=experiment.fused)) for own in decoder.layers[: layer.index])
            found = [capture(decoder, batch.tokens, stop=layer.index) for batch in batches]
            inputs = [LayerInputs({layer.index: own.hidden[layer.index]}, own.as_tuple) for own in found]
        for group in groups_of(layer, fused=experiment.fused):
            number += 1
            if number > known:
                yield _tried(group, pruned, sparsities, partial(measured, layer))
        inputs = [
            LayerInputs({layer.index + 1: run_layer(decoder, batch.tokens, layer.index, own)}, own.as_tuple)
            for batch, own in zip(batches, inputs, strict=True)
        ]


def _tried(
    group: Sequence[Projection], pruned: Trial, sparsities: Sequence[float], measured: Callable[[], float]
) -> list[float]:
    """Return what is measured while a group is pruned, at one sparsity after the other."""
    before = [p.read().clone() for p in group]
    trials = zip(*(pruned(p, sparsities) for p in group), strict=True)
    row = []
    try:
        for after in trials:
            for p, weight in zip(group, after, strict=True):
                p.write(weight)
            row.append(measured())
    finally:
        for p, weight in zip(group, before, strict=True):
            p.write(weight)
    return row


def groups_of(layer: Layer, *, fused: bool) -> list[tuple[Projection, ...]]:
    """Return the matrices of a layer's attention, and those of its MLP with all experts; `fused`, as inference engines fuse them."""
    found: dict[str, list[Projection]] = {}
    for p in layer.projections:
        found.setdefault(_group(p) if fused else "mlp" if p.role in MLP else "mixer", []).append(p)
    return [tuple(group) for group in found.values()]


def _group(p: Projection) -> str:
    """Return a name that matrices have in common that engines fuse: those of a mixer or an MLP that read its input."""
    fused = (
        "gate up" if p.role in MLP[:2] else "down" if p.role == "down" else "o" if p.role == "o" else "qkv"
    )
    return f"mixer {fused}" if p.place == "mixers" else fused
