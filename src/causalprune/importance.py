"""From effects of heads to factors on weights (method §2)."""

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.types import Role


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
