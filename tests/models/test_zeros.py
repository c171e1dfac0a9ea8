"""Zeros are counted by their bits."""

import math

import pytest
import torch
from families import FAMILIES
from reference import fresh

from causalprune.core.memory import zeros_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_of_either_sign_are_counted(family: str, dtype: torch.dtype) -> None:
    decoder = fresh(family)
    decoder.model.to(dtype)
    tiny = torch.finfo(dtype).smallest_normal  # no bits but one: the next to zero
    for number, p in enumerate(decoder.projections):
        weight = torch.full(p.shape, tiny, dtype=dtype)
        weight.view(-1)[: number + 3] = torch.tensor([0.0, -0.0, math.nan] + [0.0] * number, dtype=dtype)
        p.write(weight)
        assert zeros_in(p.read()) == number + 2
