"""The importance matrix of a model: how strongly every input of its matrices is used, by the texts that calibrate."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.calibration import batches
from causalprune.core import Calibration, Decoder, Progress, Projection, say, silent
from causalprune.interventions import InputNorms, observed
from causalprune.shipping.files import Importance

_PARTS = {
    "q": ("attn_q", "attn_qkv"),
    "k": ("attn_k",),
    "v": ("attn_v",),
    "o": ("attn_output",),
    "gate": ("ffn_gate",),
    "up": ("ffn_up",),
    "down": ("ffn_down",),
}
ENDS = {"heads": "", "mlp": "", "shared": "_shexp", "experts": "_exps"}
"""What the names of matrices end with in GGUF, by the place of the units in them."""


def importance(decoder: Decoder, calibration: Calibration, progress: Progress = silent) -> Importance:
    """Return the mean square of the inputs of every matrix, under the names that llama.cpp gives these.

    One forward pass. Of an expert that no token reached every input counts alike, as in llama.cpp.
    """
    norms, groups = InputNorms(), batches(calibration.examples, max_batch_tokens=1)  # one by one: no padding
    say(progress, unit="examples")
    for done, batch in enumerate(groups, start=1):
        with ExitStack() as stack, torch.inference_mode():
            for layer in decoder.layers:
                stack.enter_context(observed(layer, batch.real, norms.see))
            decoder.model(input_ids=batch.tokens.to(decoder.device), use_cache=False)
        progress(done, len(groups))
    found: dict[str, list[Tensor]] = {}
    for p in decoder.projections:
        if p.role in _PARTS and p.place in ENDS:
            for part in _PARTS[p.role]:
                name = f"blk.{p.layer}.{part}{ENDS[p.place]}.weight"
                found.setdefault(name, []).append(_squares(norms, p))
    return {name: np.stack([own.numpy() for own in parts]) for name, parts in found.items()}


def _squares(norms: InputNorms, projection: Projection) -> Float[Tensor, "in"]:
    own = norms.root_mean_square(projection)
    return torch.ones(projection.shape[1]) if own is None else own.square().float().cpu()


def save_importance(found: Importance, file: Path) -> None:
    """Write an importance matrix to a file, which appears whole or not at all."""
    part, arrays = file.with_suffix(".part.npz"), dict[str, Any](found)
    np.savez(part, **arrays)
    part.replace(file)


def load_importance(file: Path) -> Importance:
    """Read an importance matrix."""
    with np.load(file) as held:
        return {name: held[name] for name in held.files}
