"""What gradients say: effects of all units at once from gates that close a little, and slopes at outputs of matrices.

The rise of the loss when gate g goes from 1 to 0 is, to second order, `−∂L/∂g + ½ ∂²L/∂g²`. The first
term needs one backward pass for all units. The Gauss-Newton part of the second is half the Fisher
information of the gate, which is also the KL divergence to second order:
`KL ≈ ½ E[(∂ ln p(ŷ)/∂g)²]`, with labels ŷ drawn from the model's own predictions. Labels of different
positions are independent, so squaring the sum over positions adds nothing but noise.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalprune.core import Batch, Decoder, Example, Layer, ModelError, Progress, Projection, State, silent
from causalprune.interventions.ablation import LayerInputs, entered_at, gated, on_cpu, recomputed
from causalprune.interventions.losses import (
    Targets,
    by_row,
    chunk,
    cross_entropy,
    lost,
    other_targets,
    target_logits,
    targets,
)
from causalprune.interventions.pieces import Hold, Pieces, Slopes, as_they_are
from causalprune.interventions.statistics import observed
from causalprune.interventions.units import Parts, Site, sites

Value: TypeAlias = Callable[[Float[Tensor, "target vocab"], Targets], Float[Tensor, "target"]]
"""What every target is worth, from its logits."""


def expansion(
    decoder: Decoder,
    batch: Batch,
    units: Sequence[Parts],
    uniforms: Float[Tensor, "draw target"],
    *,
    instead: Mapping[Site, Tensor] | None = None,
    gate: float | Mapping[Site, Tensor] = 1.0,
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "unit batch"], Float[Tensor, "unit batch"]]:
    """Return the loss, and `−∂L/∂g` and `½ (∂ ln p(ŷ)/∂g)²` (mean over draws) for every unit, in nats.

    One forward and `1 + draws` backward passes. `uniforms` decide the labels drawn; `gate` is where the
    derivatives are taken: for all units together, or for each site `[part]`, or `[batch part]`. The loss is less that of
    `others` of the batch, where it has them.
    """
    gates, wanted, others = gates_at(decoder, batch, units, gate), targets(batch), other_targets(batch)
    with torch.enable_grad(), gated(decoder, gates, instead), recomputed(decoder):
        logits = target_logits(decoder, batch, wanted)
        loss = by_row(lost(logits, wanted, others), wanted)
        first = by_unit(loss, gates, units, keep=len(uniforms) > 0)
        second = torch.zeros_like(first)
        for draw, values in enumerate(uniforms):
            drawn = Targets(wanted.rows, wanted.positions, labels_of(logits, values), *batch.tokens.shape)
            chance = by_row(cross_entropy(logits, drawn), drawn)
            slope = by_unit(chance, gates, units, keep=draw + 1 < len(uniforms))
            second += slope.square() / (2 * len(uniforms))
    return loss.detach().cpu(), -first, second


def neuron_effects(decoder: Decoder, batches: Sequence[Batch]) -> dict[int, Float[Tensor, "neuron"]]:
    """Return `−∂L/∂g` of every neuron of the dense MLPs by layer, in nats summed over the batches' targets.

    What removing the neuron does to the loss, to first order. One forward and one backward pass.
    """
    own = {site: size for site, size in sites(decoder).items() if site.place == "mlp"}
    found = {site.layer: torch.zeros(size, dtype=torch.float64) for site, size in own.items()}
    for batch in batches:
        gates = {site: torch.ones(len(batch.tokens), size, requires_grad=True) for site, size in own.items()}
        wanted = targets(batch)
        with torch.enable_grad(), gated(decoder, gates), recomputed(decoder):
            loss = cross_entropy(target_logits(decoder, batch, wanted), wanted).sum()
            slopes = torch.autograd.grad(loss, list(gates.values()))
        for site, slope in zip(gates, slopes, strict=True):
            found[site.layer] -= slope.double().sum(0).cpu()
    return found


def output_slopes(
    decoder: Decoder,
    groups: Sequence[Batch],
    on_progress: Progress = silent,
    state: State | None = None,
    hold: Hold | None = None,
    last: list[LayerInputs] | None = None,
) -> dict[str, Float[Tensor, "out"]]:
    """Return the root mean square of the gradient of the batches' target loss at every projection's outputs.

    Nats per unit of activation; the mean is over all tokens, so what few tokens reach has small slopes; outputs that no token
    reaches, or on which the loss does not depend, are not there. Goes back layer by layer (`Pieces`), and makes no gradient of a
    weight. Costs about two forward passes, three where activations do not fit. What batches have added is kept in the `state`.
    What the model sends to the final norm, batch after batch, is added to `last`.
    With a `hold` for inputs of layers, each layer sees all batches before the next one runs; progress counts layers then.

    Raises:
        ModelError: a slope is not finite, of which nothing is kept.
    """
    state, after, told = state or State(), len(decoder.layers), 0
    sent = [] if last is None else last
    squares = _begun(decoder, groups, state, sent)
    done, count = len(sent), sum(int(batch.real.sum()) for batch in groups)

    def add(p: Projection, slope: Float[Tensor, "token out"]) -> None:
        if len(slope):
            squares[p.name] = squares.get(p.name, 0) + slope.float().square().sum(0).double()

    def watch(layer: Layer, batch: Batch) -> AbstractContextManager[None]:
        return observed(layer, batch.real, _unseen, add)

    def tell() -> None:
        nonlocal told
        told += 1
        if hold is not None:
            on_progress(told, 2 * after)

    if hold is None:
        on_progress(done, len(groups))
    while done < len(groups):
        own = groups[done : done + 1] if hold is None else groups
        pieces = Pieces(decoder, own, watch, hold=hold or as_they_are, told=tell)
        _go_back(decoder, pieces, own)
        sent += pieces.last
        done = len(sent)
        if state.due():
            _check_finite(squares)
            hidden, as_tuple = on_cpu(sent, after), sent[0].as_tuple
            state.flush(squares={"of": len(groups), "sums": squares, "sent": hidden, "as_tuple": as_tuple})
        if hold is None:
            on_progress(done, len(groups))
    _check_finite(squares)
    return {name: (own / count).sqrt() for name, own in squares.items() if bool(own.any())}


def _check_finite(squares: Mapping[str, Tensor]) -> None:
    for name, own in squares.items():
        if not bool(own.isfinite().all()):
            raise ModelError(
                f"slopes at the output of {name} are not finite: look for broken weights, or begin again in another "
                "output with --dtype float32 (not from files)"
            )


def _begun(
    decoder: Decoder, groups: Sequence[Batch], state: State, sent: list[LayerInputs]
) -> dict[str, Tensor]:
    """Return what a stopped run has summed over batches, and add what the last layer sent on for them to `sent`."""
    begun, after = state.values.pop("squares", {}), len(decoder.layers)
    if begun.get("of") != len(groups) or "sent" not in begun:  # nothing, or of other batches
        return {}
    sent += [LayerInputs({after: hidden}, begun["as_tuple"]) for hidden in begun["sent"]]
    places = {p.name: p.device for p in decoder.projections}
    return {name: own.to(places[name]) for name, own in begun["sums"].items()}


def _go_back(decoder: Decoder, pieces: Pieces, groups: Sequence[Batch]) -> None:
    """Go back from the summed target loss of every batch through all layers."""
    slopes: Slopes = [last_slope(decoder, *each) for each in zip(groups, pieces.last, strict=True)]
    for layer in reversed(decoder.layers):
        slopes, _ = pieces.back(layer.index, (), slopes)


def last_slope(
    decoder: Decoder, batch: Batch, last: LayerInputs, value: Value | None = None
) -> Float[Tensor, "*stream batch time model"]:
    """Return the slope of what targets are worth (their loss by default), summed over a batch, at the last layer's output."""
    after, wanted = len(decoder.layers), targets(batch)
    leaf = last.hidden[after].clone().requires_grad_()
    with torch.enable_grad(), entered_at(decoder, after, LayerInputs({after: leaf}, last.as_tuple)):
        total = (value or cross_entropy)(target_logits(decoder, batch, wanted), wanted).sum()
    (slope,) = torch.autograd.grad(total, [leaf])
    return slope


def _unseen(*_: object) -> None:
    """Look at nothing that goes forward (a `See`)."""


def uniforms(
    examples: Sequence[Example], batch: Batch, draws: int, seed: int
) -> Float[Tensor, "draw target"]:
    """Return a uniform number per draw and target token; a sequence gets the same ones in any batch."""
    rows = []
    for i in batch.indices:
        own = zlib.crc32(repr((seed, examples[i].tokens)).encode())
        generator = torch.Generator().manual_seed(own)
        rows.append(torch.rand(draws, examples[i].target_tokens, generator=generator, dtype=torch.float64))
    return torch.cat(rows, 1)


def labels_of(
    logits: Float[Tensor, "target vocab"], values: Float[Tensor, "target"]
) -> Int[Tensor, "target"]:
    """Return the label of each position where the cumulated probability passes its uniform number."""
    found = []
    for part, own in zip(logits.detach().split(chunk(logits)), values.split(chunk(logits)), strict=True):
        cumulated = part.float().softmax(-1).cumsum(-1)
        wanted = own.to(cumulated)[:, None] * cumulated[:, -1:]
        found.append(torch.searchsorted(cumulated, wanted)[:, 0].clamp_max(part.shape[-1] - 1))
    return torch.cat(found)


def gates_at(
    decoder: Decoder, batch: Batch, units: Sequence[Parts], gate: float | Mapping[Site, Tensor] = 1.0
) -> dict[Site, Tensor]:
    """Return gates `[batch part]` for derivatives: at this value at all sites of the units, or as `expansion` has it."""
    sizes, rows = sites(decoder), len(batch.tokens)
    if not isinstance(gate, float):
        return {site: own.expand(rows, -1).clone().requires_grad_() for site, own in gate.items()}
    places = dict.fromkeys(site for parts in units for site in parts)
    return {site: torch.full((rows, sizes[site]), gate).requires_grad_() for site in places}


def by_unit(
    loss: Float[Tensor, "batch"], gates: Mapping[Site, Tensor], units: Sequence[Parts], *, keep: bool
) -> Float[Tensor, "unit batch"]:
    """Return the slopes of a loss at gates, summed over the parts of each unit; `keep` where another is to follow."""
    found = torch.zeros(len(units), len(loss), dtype=torch.float64)
    owners: dict[Site, list[int]] = {}
    for number, parts in enumerate(units):
        for site in parts:
            owners.setdefault(site, []).append(number)
    slopes = torch.autograd.grad(loss.sum(), [gates[site] for site in owners], retain_graph=keep)
    for (site, own), slope in zip(owners.items(), slopes, strict=True):
        index = [units[number][site] for number in own]
        rows = torch.tensor(own).repeat_interleave(torch.tensor([len(own) for own in index]))
        found.index_add_(0, rows, slope.double().cpu().T[torch.cat(index)])
    return found
