"""Units set to zero in a model: what gates do to it, written into its weights."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from causalprune.core import Decoder, Layer, Masks, Projection
from causalprune.interventions import Parts, Site, sites


def close(decoder: Decoder, units: Iterable[Parts]) -> Masks:
    """Set all weights of units to zero, in place, and return what stays: the model does what it did with their gates closed.

    What heads share, as keys and values of a group, goes where all of them do.
    """
    gone = {site: torch.zeros(size, dtype=torch.bool) for site, size in sites(decoder).items()}
    for parts in units:
        for site, index in parts.items():
            gone[site][index] = True
    found = Masks()
    for layer in decoder.layers:
        for p in layer.projections:
            keep = ~_gone(layer, p, gone).to(p.device).expand(p.shape)
            p.erase(keep)
            found.add(p.name, keep)
    return found


def _gone(layer: Layer, p: Projection, gone: dict[Site, Tensor]) -> Bool[Tensor, "#out #in"]:
    """Return which weights of a projection belong to units that go, broadcastable."""
    units = gone[Site(layer.index, p.place)]
    if p.place in ("heads", "mixers"):
        blocks = units.view(p.blocks or 1, -1).all(1)  # those that share a block all have to go
        features = blocks.repeat_interleave(p.shape[p.role == "o"] // len(blocks))
        return features[None] if p.role == "o" else features[:, None]
    if p.place == "experts":
        return units[int(p.name.split(".")[3])].view(1, 1)
    return units[None] if p.role == "down" else units[:, None]
