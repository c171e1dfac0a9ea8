"""Packed weights that are unpacked: FP8 with a scale for every block, and MXFP4. All other forms are refused."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from causalprune.core import ModelError

Form: TypeAlias = Literal["fp8", "mxfp4"]
SUFFIXES: Mapping[Form, tuple[str, str]] = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}
"""What the names of codes and scales have beyond the name of the weight."""
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = torch.tensor([*_HALF, *(-value for value in _HALF)])


def packing(record: Any, name: str) -> Form | None:
    """Return how a model is packed by the `quantization_config` of its configuration, None where it is not.

    Raises:
        ModelError: in a form that is not known to come out right.
    """
    if not record:
        return None
    own = record if isinstance(record, Mapping) else record.to_dict()
    method = str(getattr(own.get("quant_method"), "value", own.get("quant_method")))
    if method == "mxfp4":
        return "mxfp4"
    if method == "fp8" and own.get("weight_block_size") and own.get("activation_scheme") == "dynamic":
        return "fp8"
    raise ModelError(
        f"{name!r} is packed by {method}, in a form that is not unpacked here (block-wise FP8, MXFP4 and GGUF are): "
        "pass the model that it was made from"
    )


def unpack_fp8(codes: Tensor, scales: Tensor, size: tuple[int, int]) -> Float[Tensor, "... out in"]:
    """Return weights in float32 from their codes and the scale of every block of a `size`, the last of which may be cut short."""
    out, into = codes.shape[-2:]
    each = scales.float().repeat_interleave(size[0], -2)[..., :out, :]
    return codes.float() * each.repeat_interleave(size[1], -1)[..., :into]


def unpack_mxfp4(
    blocks: UInt8[Tensor, "... out n half"], scales: UInt8[Tensor, "... out n"]
) -> Float[Tensor, "... in out"]:
    """Return weights in float32 from two codes a byte and the exponent of every block of 32, transposed as in gpt-oss."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = torch.ldexp(FP4[codes], scales.int()[..., None] - 127)
    return values.flatten(-2).transpose(-1, -2)
