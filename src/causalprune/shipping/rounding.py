"""A model in memory as it will be in a file: every matrix through its type and back, so that any measure can be taken of it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from causalprune.core import Decoder, ModelError, Progress, Projection, say, silent
from causalprune.shipping.files import Importance, decoded, encoded
from causalprune.shipping.weighing import ENDS

_NAMES = {
    "q": ("attn_q", "attn_qkv"),
    "k": ("attn_k", "attn_qkv"),
    "v": ("attn_v", "attn_qkv"),
    "o": ("attn_output",),
    "gate": ("ffn_gate", "ffn_up"),
    "up": ("ffn_up",),
    "down": ("ffn_down",),
}
"""What a matrix is in GGUF, and what it is a part of where that has it in one."""


@torch.no_grad()
def rounded(
    decoder: Decoder, types: Mapping[str, str], importance: Importance, progress: Progress = silent
) -> Decoder:
    """Return the model, whose weights are now those of a file with these types; rows are quantised one by one, whatever their order.

    Raises:
        ModelError: the file has quantised matrices that are none of the decoder's, so that it cannot be measured so.
    """
    say(progress, unit="matrices")
    seen, pool = set[str](), decoder.projections
    for done, p in enumerate(pool, start=1):
        name = _in_file(p, types)
        seen.add(name)
        own = importance.get(name)
        p.write(_through(p.read(), types[name], None if own is None else own[p.expert or 0][None]))
        progress(done, len(pool))
    for name, module in (
        ("token_embd.weight", decoder.model.get_input_embeddings()),
        ("output.weight", decoder.model.get_output_embeddings()),
    ):
        if name in types:
            seen.add(name)
            module.weight.copy_(_through(module.weight, types[name], None))
    if left := [name for name in types.keys() - seen if types[name] not in ("F32", "F16", "BF16")]:
        raise ModelError(
            f"{decoder.name} has {len(left)} matrices in GGUF ({min(left)}, …) that are no part of what is pruned here: what "
            "quantising them does cannot be measured; `export` writes the file all the same"
        )
    return decoder


def _in_file(p: Projection, types: Mapping[str, str]) -> str:
    """Return the name that a matrix, or the one that it is a part of, has in the file."""
    parts = _NAMES.get(p.role, ()) if p.place in ENDS else ()
    names = [f"blk.{p.layer}.{part}{ENDS[p.place]}.weight" for part in parts]
    found = next((name for name in names if name in types), None)
    if found is None:
        raise ModelError(
            f"{p.name} has no counterpart in GGUF that is known here: it cannot be measured as a file"
        )
    return found


def _through(weight: Tensor, kind: str, importance: np.ndarray | None) -> Tensor:
    """Return weights as they come out of a type."""
    rows = np.ascontiguousarray(weight.float().cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(decoded(encoded(rows, kind, importance), kind))).to(weight)
