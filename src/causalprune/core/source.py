"""Where a model came from."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Source:
    """The files that a model was loaded from, from which it is written again.

    `dtype` is that of most weights, or of all where they are unpacked from a `form` (`fp8`, `mxfp4`, `gguf`); `pickles` and
    `code` are what the user has allowed; `hub` says that `folder` is a snapshot, which may lack files. Where a model was
    `reshaped`, files do not say any more which tensors it has.
    """

    folder: Path | None
    dtype: torch.dtype
    form: str | None = None
    pickles: bool = False
    code: bool = False
    hub: bool = False
    reshaped: bool = False
