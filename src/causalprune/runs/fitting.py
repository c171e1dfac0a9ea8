"""Where a model is pruned: in memory, or from file to file where it does not fit."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from causalprune.calibration import DATE
from causalprune.checkpoints import resolve
from causalprune.core import ModelError, OptionError, free_bytes
from causalprune.models import check_options, device_of, read_shape
from causalprune.pruning import Method
from causalprune.runs.plans import memory_bytes, size_bytes
from causalprune.runs.recipe import ModelSpec, Shape
from causalprune.streaming import COPIES, check_streams


@dataclass(frozen=True)
class Place:
    """How a model is pruned, from estimates: the memory that it takes as a whole, what is free, and the disk."""

    stream: bool
    needed_bytes: float
    free_bytes: float
    disk_bytes: float

    def __str__(self) -> str:
        way = "from file to file, a layer in memory at a time" if self.stream else "in memory"
        return f"{way}: about {_gib(self.needed_bytes)} needed in memory, {_gib(self.free_bytes)} free; {_gib(self.disk_bytes)} on disk"


def place(spec: ModelSpec, method: Method, batch_tokens: int, *, stream: bool | None = None) -> Place:
    """Choose how a model is pruned, from its configuration alone: as asked for, or by what fits.

    Raises:
        ModelError: it does not fit into memory, and cannot be pruned from its files; says why.
        OptionError: it is to be streamed, and cannot be.
    """
    device = device_of(spec.device)
    check_options(spec.dtype, device)
    layers, heads, parameters = read_shape(
        resolve(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code
    )
    shape = Shape(layers, heads, float(parameters))
    size = size_bytes(spec, shape.parameters)
    needed = memory_bytes(shape, size, [method.resolved_update], batch_tokens)
    free = free_bytes(torch.device(device))
    if stream is None and needed > free:
        try:
            check_stored(spec)
            check_streams(method)
        except OptionError as error:
            raise ModelError(
                f"{spec.name} needs about {_gib(needed)} of memory, {_gib(free)} are free, and it cannot be pruned from its "
                f"files: {error}"
            ) from None
        stream = True
    elif stream:
        check_stored(spec)
        check_streams(method)
    copies = COPIES if stream and method.takes_long else 0
    return Place(bool(stream), needed, free, (1 + copies) * size)


def check_stored(spec: ModelSpec) -> None:
    """Raise `OptionError` where a model is not one that is pruned from its files."""
    if replace(spec, date=DATE, device="auto") != ModelSpec(spec.name):
        raise OptionError(
            "--stream keeps the dtype of the files, takes one device and runs no code: leave the other options out"
        )
    if not Path(spec.name).expanduser().is_dir():
        raise OptionError(
            f"--stream takes a local folder of safetensors files, and {spec.name!r} is none: download it first"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
