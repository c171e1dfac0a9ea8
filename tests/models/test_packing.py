"""Packed weights come out as their codes and scales say."""

import torch

from causalprune.models.packing import unpack_fp8


def test_the_last_blocks_may_be_cut_short() -> None:
    """As in DeepSeek V3, whose latent keys have 576 rows in blocks of 128."""
    random = torch.Generator().manual_seed(0)
    codes = torch.randn(2, 5, 7, generator=random).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 3, generator=random)
    found = unpack_fp8(codes, scales, (4, 3))
    for e, i, j in ((0, 0, 0), (0, 4, 6), (1, 3, 2), (1, 2, 3)):
        assert found[e, i, j] == codes[e, i, j].float() * scales[e, i // 4, j // 3]
