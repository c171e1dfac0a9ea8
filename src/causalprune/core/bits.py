"""Weights as integers, and in pieces that fit the cache."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bands(weight: Float[Tensor, "out in"]) -> list[slice]:
    """Return neighbouring rows to look at together, so that what is made of them stays in the processor's cache."""
    rows = max(2**21 // weight.shape[1], 1)
    return [slice(at, at + rows) for at in range(0, len(weight), rows)]


def bits_of(weight: Float[Tensor, "out in"]) -> Int[Tensor, "out in"]:
    """Return a view of a matrix as integers."""
    return weight.view(_INTEGERS[weight.element_size()])
