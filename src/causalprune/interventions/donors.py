"""What takes the place of removed activations, taken from passes of the intact model."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalprune.core import Batch, Decoder
from causalprune.interventions.ablation import run_until, site_inputs
from causalprune.interventions.units import Site

Instead = Mapping[Site, Float[Tensor, "#batch #time width"]]
"""Activations by the place where they stand."""


def means(decoder: Decoder, groups: Iterable[Batch], places: Sequence[Site]) -> Instead:
    """Return the mean input of every site over all positions. One forward pass."""
    sums, positions = dict[Site, Tensor](), 0
    for batch in groups:
        real = batch.real.flatten()
        positions += int(real.sum())
        for site, x in seen(decoder, batch.tokens, places).items():
            flat = x.flatten(0, -2)
            total = flat[real.to(flat.device)].double().sum(0)
            sums[site] = sums[site] + total if site in sums else total
    return {site: (total / positions).view(1, 1, -1) for site, total in sums.items()}


def seen(
    decoder: Decoder, tokens: Int[Tensor, "batch time"], places: Sequence[Site]
) -> dict[Site, Float[Tensor, "batch time width"]]:
    """Return what sites get on these tokens. One forward pass without logits; holds all of it."""
    with site_inputs(decoder, places) as found, torch.no_grad():  # not inference mode: gradients go past it
        run_until(decoder, tokens, len(decoder.layers) - 1)
    return {site: x.reshape(*tokens.shape, -1) for site, x in found.items()}


def shifted(batch: Batch, found: Mapping[Site, Float[Tensor, "batch time width"]]) -> Instead:
    """Return what the next sequence of the batch has at each position, from its start again where it is shorter."""
    donor = (torch.arange(len(batch.tokens)) + 1) % len(batch.tokens)
    time = torch.arange(batch.tokens.shape[1]) % batch.lengths[donor][:, None]
    return {site: x[donor[:, None], time] for site, x in found.items()}


def donated(
    decoder: Decoder, batch: Batch, places: Sequence[Site], ablation: str, mean: Instead | None = None
) -> Instead:
    """Return what takes the place of all that is removed at these sites: nothing for zeros, `[1 1 width]` or `[row time width]`."""
    if ablation == "zero":
        return {}
    if ablation == "mean":
        assert mean is not None
        return {site: mean[site] for site in places}
    if ablation == "counterfactual":
        assert batch.counterfactual is not None
        return seen(decoder, batch.counterfactual, places)
    return shifted(batch, seen(decoder, batch.tokens, places))
