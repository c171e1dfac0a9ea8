"""From effects of heads to factors on weights (method §2)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.attribution import scores
from causalprune.core import Decoder, Effects, MismatchError, OptionError, Role

KINDS = {"heads": "head", "mixers": "mixer"}
"""Kinds of the units of mixers, by place."""
Factors = Mapping[str, Float[Tensor, "_ _"]]  # by projection; each broadcasts to its own [out in]


def head_importance(delta_nats: Float[Tensor, "unit"]) -> Float[Tensor, "unit"]:
    """Scale Δ linearly to [1, 10] over all heads of the model; all-equal scores give 1 everywhere.

    Raises:
        ValueError: a score is not finite.
    """
    if not torch.isfinite(delta_nats).all():
        raise ValueError(f"{int((~torch.isfinite(delta_nats)).sum())} head scores are not finite")
    low, high = delta_nats.aminmax()
    if low == high:
        return torch.ones_like(delta_nats)
    return 1 + 9 * ((delta_nats - low) / (high - low))


def weight_factor(
    importance: Float[Tensor, "heads"], role: Role, shape: tuple[int, int], blocks: int
) -> Float[Tensor, "#out #in"]:
    """Return the factor on a projection's weights, broadcastable to `[out in]`.

    Rows of q and columns of o take the importance of their head, rows of k and v the mean over the
    query heads that share the key-value head, other weights (`blocks` 0) the mean over the heads of their layer.
    """
    if not blocks:
        return importance.mean().view(1, 1)
    factor = importance.view(blocks, -1).mean(1).repeat_interleave(shape[role == "o"] // blocks)
    return factor[None, :] if role == "o" else factor[:, None]


def cap_units(decoder: Decoder) -> tuple[str, ...]:
    """Return the kinds of units whose effects `cap` needs: the heads of all mixers."""
    places = {mixer.place for layer in decoder.layers for mixer in layer.mixers}
    return tuple(sorted(places)) or ("heads",)


def head_factors(decoder: Decoder, effects: Effects | None, found: str | None) -> Factors:
    """Return the factor on the weights of every matrix (method §2); the heads of all mixers are scaled together.

    Weights of a layer that no head owns take the mean over the heads of whatever mixers it has, those of a layer without any
    the mean over all.

    `found` is the fingerprint of the weights now, None where the caller compares it with that of the effects later.
    """
    if effects is None:
        raise OptionError("method 'cap' needs effects: measure them first (`causalprune attribute`)")
    if found is not None and effects.model_fingerprint != found:
        raise MismatchError(f"the effects were measured on another model or revision than {decoder.name}")
    heads, mixers = effects.of("head", "mixer"), [mixer for layer in decoder.layers for mixer in layer.mixers]
    if len(heads.units) != sum(mixer.n_heads for mixer in mixers):
        places = " --units ".join(sorted({mixer.place for mixer in mixers}))
        raise OptionError(
            f"method 'cap' needs the effects of all heads, and these hold {len(heads.units)}: measure with --units {places}"
        )
    importance = head_importance(scores(heads)).float()
    by_place = {place: [unit.kind == kind for unit in heads.units] for place, kind in KINDS.items()}
    layers = torch.tensor([unit.layer for unit in heads.units])
    factors = {}
    for layer in decoder.layers:
        inside = layers == layer.index
        whole = importance[inside] if bool(inside.any()) else importance
        for p in layer.projections:
            own = importance[inside & torch.tensor(by_place[p.place])] if p.blocks else whole
            factors[p.name] = weight_factor(own, p.role, p.shape, p.blocks).to(p.device)
    return factors
