"""Where a model is pruned: in memory, or from file to file where it does not fit."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from causalprune.calibration import DATE
from causalprune.checkpoints import resolve
from causalprune.core import Decoder, MismatchError, ModelError, OptionError, free_bytes, size_of
from causalprune.models import check_options, device_of, read_shape
from causalprune.pruning import TRAINS, Method, check_dtype
from causalprune.runs.plans import dtype_of, memory_bytes, size_bytes
from causalprune.runs.recipe import ModelSpec, Shape
from causalprune.streaming import check_streams, copies_of, was_streamed

WEIGHTS = "layer-", "training", "trained"
"""What files begin with that have weights, of those that a stopped run in memory has kept."""


@dataclass(frozen=True)
class Place:
    """How a model is pruned, from estimates: the memory that it takes as a whole, what is free, and the disk."""

    stream: bool
    needed_bytes: float
    free_bytes: float
    disk_bytes: float

    def __str__(self) -> str:
        free, disk = f"{_gib(self.free_bytes)} free", f"{_gib(self.disk_bytes)} on disk"
        if self.stream:
            return (
                f"from file to file, a layer in memory at a time (the whole model would take about {_gib(self.needed_bytes)}, {free}); "
                f"{disk}, and hidden states beyond --cache-gib"
            )
        return f"in memory: about {_gib(self.needed_bytes)} needed, {free}; {disk}"


def place(
    spec: ModelSpec,
    method: Method,
    batch_tokens: int,
    *,
    stream: bool | None = None,
    kept_in: Path | None = None,
    effects: bool = True,
) -> Place:
    """Choose how a model is pruned, from its configuration alone: as asked for, as a stopped run `kept_in` a folder was, or by what fits.

    A model that is spread over devices is taken to fit. What needs `effects` is pruned from its files only where they are there.

    Raises:
        ModelError: it does not fit into memory, and cannot be pruned from its files; says why.
        OptionError: it is to be streamed, and cannot be, or trained in a type that is too narrow.
        MismatchError: a stopped run went from files, and this one cannot.
    """
    device = device_of(spec.device)
    check_options(spec.dtype, device)
    check_trained(spec, method.resolved_update)
    began = was_streamed(kept_in) if stream is None and kept_in is not None else None
    layers, heads, parameters = read_shape(
        resolve(spec.name), revision=spec.revision, trust_remote_code=spec.trust_remote_code
    )
    shape = Shape(layers, heads, float(parameters))
    size = size_bytes(spec, shape.parameters)
    needed = memory_bytes(shape, size, [method.resolved_update], batch_tokens)
    free = free_bytes(torch.device(device))
    crowded = stream is None and began is None and needed > free and spec.device_map is None
    if stream or began or crowded:
        try:
            check_stored(spec)
            check_streams(method, effects=effects)
        except OptionError as error:
            if stream:
                raise
            if began:
                raise MismatchError(
                    f"{kept_in} is of a stopped run from files: delete it, or choose another output"
                ) from None
            raise ModelError(
                f"{spec.name} needs about {_gib(needed)} of memory, {_gib(free)} are free, and it cannot be pruned from its "
                f"files: {error}"
            ) from None
        stream = True
    copies = copies_of(method) if stream else int(method.takes_long)
    return Place(bool(stream), needed, free, (1 + copies) * size)


def room_of(decoder: Decoder, kept_in: Path | None) -> float:
    """Return the bytes of disk that the checkpoint takes, and a copy of its prunable weights `kept_in` a folder until it is there."""
    if kept_in is None:
        return float(size_of(decoder).bytes)
    kept = kept_in.glob("*") if kept_in.is_dir() else ()
    there = sum(path.stat().st_size for path in kept if path.name.startswith(WEIGHTS))
    copy = sum(p.size * p.parameter.element_size() for p in decoder.projections)
    return float(size_of(decoder).bytes + max(copy - there, 0))


def check_trained(spec: ModelSpec, update: str) -> None:
    """Raise `OptionError`, before anything is loaded, for a model that is to be trained in a type too narrow for gradients."""
    if update in TRAINS:
        check_dtype(spec.name, dtype_of(spec))


def check_stored(spec: ModelSpec) -> None:
    """Raise `OptionError` where a model is not one that is pruned from its files."""
    if replace(spec, date=DATE, device="auto") != ModelSpec(spec.name):
        raise OptionError(
            "--stream keeps the dtype of the files, takes one device and runs no code: leave the other options out"
        )
    if not Path(resolve(spec.name)).expanduser().is_dir():
        raise OptionError(
            f"--stream takes a local folder of safetensors files, and {spec.name!r} is none: for a name on the Hub, "
            f"`hf download {spec.name} --local-dir FOLDER` first"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
