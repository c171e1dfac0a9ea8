"""How far weights move: pure functions of a slope and of what is remembered of earlier ones, in one literal dict.

A rule gets what it remembers of a matrix, empty at first, and changes it; the slope of the loss at the weights, in float32
and zero where nothing is kept, which it may change too; what is kept, as ones in float32 (products with a mask of booleans
take ten times as long on CPUs); and the number of the step, from 1. It returns a direction of about one a weight.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Rule: TypeAlias = Callable[
    [dict[str, Tensor], Float[Tensor, "out in"], Float[Tensor, "out in"], int], Float[Tensor, "out in"]
]
LONGER = 0.8
"""The memory of step t is 1 − t^−0.8 of what was there, as Adafactor's."""
MOST = 1.0
"""Root mean square of a direction, at most."""
BETAS = 0.9, 0.95
SPARE = {torch.bfloat16: 16}
"""Bits of float32 that a narrower type of the same range has not."""


def factored(
    known: dict[str, Tensor], slope: Float[Tensor, "out in"], keep: Float[Tensor, "out in"], number: int
) -> Float[Tensor, "out in"]:
    """Slopes over their root mean squares, told from those of row and column; no momentum, none larger than `MOST`.

    Adafactor's second moments (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5), here over kept weights.
    """
    tiny, squares = torch.finfo(torch.float32).tiny, slope.square()
    for axis, name in ((1, "rows"), (0, "columns")):
        if (counted := f"kept {name}") not in known:  # what is kept stays the same
            known[counted] = keep.sum(axis)
        own = squares.sum(axis).div_(known[counted].clamp_min(1))
        known[name] = known.get(name, own).lerp(own, number**-LONGER)
    del squares
    counts, rows, columns = known["kept rows"], known["rows"], known["columns"]
    total = counts.sum().clamp_min_(1)
    mean = ((rows * counts).sum() / total).clamp_min_(tiny)
    move = slope.mul_((rows / mean).clamp_min_(tiny).rsqrt_()[:, None]).mul_(columns.clamp_min(tiny).rsqrt_())
    size = torch.linalg.vector_norm(move) / total.sqrt()
    return move.div_((size / MOST).clamp_min(1.0))


def adam(
    known: dict[str, Tensor], slope: Float[Tensor, "out in"], keep: Float[Tensor, "out in"], number: int
) -> Float[Tensor, "out in"]:
    """Means of slopes over roots of means of their squares, eight bytes a weight (Kingma & Ba 2014, arXiv 1412.6980)."""
    found = []
    for beta, name, own in zip(BETAS, ("first", "second"), (slope, slope.square()), strict=True):
        known[name] = known.get(name, torch.zeros_like(slope)).lerp(own, 1 - beta)
        found.append(known[name] / (1 - beta**number))
    return found[0] / found[1].sqrt().add_(1e-8)


RULES: dict[str, Rule] = {"distill": factored, "adam": adam}


def stored(
    weight: Float[Tensor, "out in"], keep: Float[Tensor, "out in"], dtype: torch.dtype, seed: int
) -> Float[Tensor, "out in"]:
    """Return weights as `dtype` holds them: rounded up or down by chance, so that small steps count in the mean.

    The chance depends on the `seed` alone. No kept weight becomes zero, which would be taken for one that was pruned. Float32
    weights may be changed on the way.
    """
    if spare := SPARE.get(dtype):
        generator = torch.Generator(weight.device).manual_seed(seed)
        chance = torch.randint(
            1 << spare, weight.shape, generator=generator, dtype=torch.int32, device=weight.device
        )
        weight.view(torch.int32).add_(chance).bitwise_and_(-1 << spare)
    lost = torch.eq(weight, 0, out=torch.empty_like(weight)).mul_(keep)
    if bool(torch.linalg.vector_norm(lost)):
        weight.masked_fill_(lost.bool(), torch.finfo(dtype).tiny)
    return weight
