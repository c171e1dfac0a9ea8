"""Units, or single weights, set to zero or scaled in a model: what gates do to it, written into its weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalprune.core import Decoder, Masks, Projection
from causalprune.interventions import Parts, Site, shares, sites
from causalprune.pruning.owning import owned, private

Weights: TypeAlias = Mapping[str, Int[Tensor, "_"]]
"""Single weights of projections by name: places in `[out in]`, row by row."""


def close(decoder: Decoder, units: Iterable[Parts]) -> Masks:
    """Set the weights of units to zero, in place, and return what stays: the model does what it did with their gates closed.

    What heads share, as keys and values of a group, goes where all of them do, and so do rows that units look at together, as
    under a norm over all queries.
    """
    units = list(units)
    found = staying(decoder, units)
    for p in decoder.projections:
        p.erase(found[p.name])
    still(decoder, units)
    return found


def still(decoder: Decoder, units: Iterable[Parts], factor: float = 0.0) -> None:
    """Scale what units send without a weight, in place: experts have output biases, which their gates close too."""
    gone, named = _members(decoder, units), dict(decoder.model.named_parameters())
    for p in decoder.projections:
        if p.place == "experts" and p.role == "down":
            number, name = int(p.name.split(".")[3]), p.parameter_name
            stack = p.expert is not None
            bias = named.get(f"{name}_bias" if stack else f"{name.removesuffix('weight')}bias")
            if bias is not None and bool(gone[Site(p.layer, p.place)][number]):
                (bias.data[number] if stack else bias.data).mul_(factor)


def staying(decoder: Decoder, units: Iterable[Parts]) -> Masks:
    """Return what would stay of all weights without units."""
    found = Masks()
    for p, own in _going(decoder, units):
        found.add(p.name, ~own.to(p.device).expand(p.shape))
    return found


def size_of_parts(decoder: Decoder, units: Iterable[Parts]) -> int:
    """Return the number of weights that are zero once units are closed; those of rows that others need too stay."""
    return sum(int(own.sum()) * (p.size // own.numel()) for p, own in _going(decoder, units))


def _going(decoder: Decoder, units: Iterable[Parts]) -> Iterator[tuple[Projection, Bool[Tensor, "#out #in"]]]:
    """Yield of every projection which weights go with units, broadcastable: rows where no unit that stays sees them."""
    gone, alone, handed = _members(decoder, units), private(decoder), shares(decoder)
    for p in decoder.projections:
        site = Site(p.layer, p.place)
        own = site in alone or bool(gone[site].all())
        own = own and not (handed and p.role in ("k", "v"))
        sends = p.role in ("o", "down") or p.place == "experts"
        yield p, owned(p, gone[site]) if own or sends else torch.zeros(1, 1, dtype=torch.bool)


def _members(decoder: Decoder, units: Iterable[Parts]) -> dict[Site, Bool[Tensor, "part"]]:
    """Return for every site which parts belong to one of the units."""
    found = {site: torch.zeros(size, dtype=torch.bool) for site, size in sites(decoder).items()}
    for parts in units:
        for site, index in parts.items():
            found[site][index] = True
    return found


def _sent(p: Projection, parts: Bool[Tensor, "part"]) -> Bool[Tensor, "#out #in"]:
    """Return which columns of an output projection carry these parts."""
    if p.place == "experts":
        return parts[int(p.name.split(".")[3])].view(1, 1)
    return parts.repeat_interleave(p.shape[1] // len(parts))[None]


def dampen(decoder: Decoder, units: Iterable[Parts], factor: float) -> None:
    """Scale what units send, in place: the model does what it did with their gates at this factor."""
    units = list(units)
    gone = _members(decoder, units)
    still(decoder, units, factor)
    for layer in decoder.layers:
        for p in layer.projections:
            if p.role in ("o", "down"):
                weight = p.read()
                scale = torch.where(_sent(p, gone[Site(layer.index, p.place)]).to(p.device), factor, 1.0)
                p.write(weight * scale.to(weight.dtype))


def scale(decoder: Decoder, index: Weights, factor: float) -> None:
    """Scale single weights, in place."""
    own = {p.name: p for p in decoder.projections}
    for name, at in index.items():
        _poke(own[name], at, _peek(own[name], at) * factor)


def staying_weights(decoder: Decoder, index: Weights) -> Masks:
    """Return what would stay of all weights without single ones."""
    found = Masks()
    for p in decoder.projections:
        keep = torch.ones(p.size, dtype=torch.bool, device=p.device)
        keep[index.get(p.name, torch.zeros(0, dtype=torch.long)).to(p.device)] = False
        found.add(p.name, keep.view(p.shape))
    return found


@contextmanager
def scaled(decoder: Decoder, index: Weights, factor: float) -> Iterator[None]:
    """Scale single weights in the block; afterwards they are what they were, bit for bit."""
    own = {p.name: p for p in decoder.projections}
    before = {name: _peek(own[name], at) for name, at in index.items()}
    try:
        for name, at in index.items():
            _poke(own[name], at, before[name] * factor)
        yield
    finally:
        for name, at in index.items():
            _poke(own[name], at, before[name])


def _place(p: Projection, at: Int[Tensor, "_"]) -> tuple[Int[Tensor, "_"], Int[Tensor, "_"]]:
    at = at.to(p.device)
    return at // p.shape[1], at % p.shape[1]


def _peek(p: Projection, at: Int[Tensor, "_"]) -> Float[Tensor, "_"]:
    return p.read()[_place(p, at)].clone()


def _poke(p: Projection, at: Int[Tensor, "_"], values: Float[Tensor, "_"]) -> None:
    weight = p.read()
    weight[_place(p, at)] = values
    if isinstance(p.rows, Tensor):  # what was read is a copy
        p.write(weight)
