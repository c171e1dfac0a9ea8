"""Units set to zero in a model: what gates do to it, written into its weights."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from causalprune.core import Decoder, Layer, Masks, Projection
from causalprune.interventions import Parts, Site, sites


def close(decoder: Decoder, units: Iterable[Parts]) -> Masks:
    """Set all weights of units to zero, in place, and return what stays: the model does what it did with their gates closed.

    Keys and values go where all heads that share them do.
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
    if p.role in ("q", "k", "v", "o"):
        heads, attention = gone[Site(layer.index, "heads")], layer.attention
        if p.role in ("k", "v"):
            heads = heads.view(attention.n_kv_heads, -1).all(1)
        features = heads.repeat_interleave(attention.head_dim)
        return features[None] if p.role == "o" else features[:, None]
    if ".experts." in p.name:
        return gone[Site(layer.index, "experts")][int(p.name.split(".")[3])].view(1, 1)
    neurons = gone[Site(layer.index, "shared" if ".shared." in p.name else "mlp")]
    return neurons[None] if p.role == "down" else neurons[:, None]
