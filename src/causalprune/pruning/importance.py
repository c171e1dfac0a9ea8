"""From effects of heads to factors on weights (method §2)."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.attribution import scores
from causalprune.core import Decoder, Effects, MismatchError, OptionError, Role

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
    importance: Float[Tensor, "heads"], role: Role, *, n_kv_heads: int, head_dim: int
) -> Float[Tensor, "#out #in"]:
    """Return the factor on a projection's weights, broadcastable to `[out in]`.

    Rows of q and columns of o take the importance of their head, rows of k and v the mean over the
    query heads that share the key-value head, MLP weights the mean over the heads of their layer.
    """
    if role == "q":
        return importance.repeat_interleave(head_dim)[:, None]
    if role == "o":
        return importance.repeat_interleave(head_dim)[None, :]
    if role in ("k", "v"):
        return importance.view(n_kv_heads, -1).mean(1).repeat_interleave(head_dim)[:, None]
    return importance.mean().view(1, 1)


def head_factors(decoder: Decoder, effects: Effects | None, found: str | None) -> Factors:
    """Return the factor on the weights of every matrix (method §2).

    `found` is the fingerprint of the weights now, None where the caller compares it with that of the effects later.
    """
    if effects is None:
        raise OptionError("method 'cap' needs effects: measure them first (`causalprune attribute`)")
    if found is not None and effects.model_fingerprint != found:
        raise MismatchError(f"the effects were measured on another model or revision than {decoder.name}")
    heads = effects.of("head")
    if len(heads.units) != sum(layer.attention.n_heads for layer in decoder.layers):
        raise OptionError(
            f"method 'cap' needs the effects of all heads, and these hold {len(heads.units)}: measure with --units heads"
        )
    importance = head_importance(scores(heads)).float()
    layers = torch.tensor([unit.layer for unit in heads.units])
    factors = {}
    for layer in decoder.layers:
        own = importance[layers == layer.index]
        for p in layer.projections:
            shape = layer.attention.n_kv_heads, layer.attention.head_dim
            factors[p.name] = weight_factor(own, p.role, n_kv_heads=shape[0], head_dim=shape[1])
            factors[p.name] = factors[p.name].to(p.device)
    return factors
