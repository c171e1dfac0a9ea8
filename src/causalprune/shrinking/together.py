"""Which units stay, where some have to go together: neurons in steps, experts by a router's groups, KV groups by who reads them."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from causalprune.core import Decoder
from causalprune.shrinking.worth import Kind

MULTIPLE = 32
"""Neurons go in steps of so many, where their number is a multiple: what matrix kernels are fast with."""


def step_of(kind: Kind, units: int, borders: int = 1) -> int:
    """Return how many units of a kind go at once: as many of each part, where there are `borders` between such parts."""
    if kind == "neurons" and units % MULTIPLE == 0 and units > MULTIPLE:
        return MULTIPLE
    return borders


def parts_of(decoder: Decoder, kind: Kind) -> int:
    """Return in how many parts a router chooses among experts: first among parts, by what their best are worth; else 1."""
    config = decoder.model.config.get_text_config(decoder=True)
    parts, some = (getattr(config, name, None) or 1 for name in ("n_group", "topk_group"))
    return int(parts) if kind == "experts" and some < parts else 1


def worthiest(worth: Tensor | None, n: int, parts: int = 1) -> Int[Tensor, "_"]:
    """Return the indices of the `n` units that are worth most, in order, equally many of each part.

    Of those whose worth is not known come the first.
    """
    if worth is None:
        return torch.arange(n)
    each = worth.nan_to_num(nan=torch.inf).view(parts, -1)
    best = each.argsort(dim=1, descending=True, stable=True)[:, : n // parts].sort(dim=1).values
    return (best + torch.arange(parts)[:, None] * each.shape[1]).flatten()


def staying(
    decoder: Decoder, kind: Kind, each: Mapping[int, tuple[Tensor | None, int]]
) -> dict[int, Int[Tensor, "_"]]:
    """Return the indices of the units that stay in every layer, of what each is worth and how many stay there."""
    parts = parts_of(decoder, kind)
    found = {layer: worthiest(worth, n, parts) for layer, (worth, n) in each.items()}
    return following(decoder, found) if kind == "kv_groups" else found


def following(decoder: Decoder, groups: Mapping[int, Int[Tensor, "_"]]) -> dict[int, Int[Tensor, "_"]]:
    """Return which KV groups stay: in layers that read the keys and values of an earlier one, those that stay there."""
    config, found = decoder.model.config.get_text_config(decoder=True), dict(groups)
    last: dict[str, int] = {}
    for i, mode in enumerate(getattr(config, "kv_sharing_modes", None) or ()):
        kind = config.layer_types[i]
        if mode == "reuse" and i in found:
            found[i] = found[last[kind]]
        elif mode != "reuse":
            last[kind] = i
    return found
