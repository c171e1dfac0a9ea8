"""Where a model comes from, and what transformers is told so that packed weights come out as they are meant."""

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from causalprune.core import CheckpointError, ModelError, Source
from causalprune.models.folders import FORMS, Stored, open_checkpoint, stored_in
from causalprune.models.packing import packing
from causalprune.models.shards import Made

_UNPACKED: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}


def opened(
    name: str, source: Source, config: Any, dtype: str, options: Mapping[str, Any]
) -> tuple[Source, dict[str, Any]]:
    """Return where a model comes from, and in which dtype it is loaded: unpacked, also where a GPU could take it as it is.

    With a `state_dict` among the options, weights are those, and `config` says nothing of packing any more.
    """
    if "gguf_file" in options:
        held = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        how = {"dtype": held, "config": config, "ignore_mismatched_sizes": True}
        return replace(source, folder=None, dtype=held, form="gguf", hub=False), how
    unpacked = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    form = packing(getattr(config, "quantization_config", None), name)
    source = replace(source, dtype=unpacked, form=form)
    if form is None:
        return source, {"dtype": dtype}
    if form == "fp8" and (own := _cut_short(name, source, config, options.get("revision"))):
        return source, {"dtype": unpacked, **own}
    return source, {"dtype": unpacked, "quantization_config": _UNPACKED[form](dequantize=True)}


def _cut_short(name: str, source: Source, config: Any, revision: str | None) -> dict[str, Any]:
    """Return options with the weights, if a last block of some is cut short: transformers would divide it as if all were equal."""
    home = _fetched(config, source, revision)
    try:
        stored = open_checkpoint(home, source.dtype, pickles=source.pickles)
    except CheckpointError as error:
        raise ModelError(f"{name!r} cannot be loaded: {error}") from error
    record = config.quantization_config
    blocks = (record if isinstance(record, Mapping) else record.to_dict())["weight_block_size"]
    if not _uneven(stored, blocks):
        return {}
    del config.quantization_config
    how = {"config": config, "state_dict": {own: entry.read() for own, entry in stored.entries.items()}}
    with contextlib.suppress(OSError):  # many have none
        how["generation_config"] = GenerationConfig.from_pretrained(home)
    return how


def _uneven(stored: Stored, blocks: tuple[int, int]) -> bool:
    """Tell whether something is packed in several blocks of which the last is smaller."""
    packed = (
        entry.parts[0].shape[-2:]
        for entry in stored.entries.values()
        if isinstance(entry, Made) and len(entry.parts) > 1
    )
    return any(n > size and n % size for shape in packed for n, size in zip(shape, blocks, strict=True))


def _fetched(config: Any, source: Source, revision: str | None) -> Path:
    """Return the local folder of a model, with its safetensors files."""
    if not source.hub:
        return Path(str(source.folder))
    how: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    for own in (getattr(config, "transformers_weights", None), *FORMS[:2]):
        if own and (file := cached_file(str(source.folder), own, **how)):
            if own.endswith(".json"):
                get_checkpoint_shard_files(str(source.folder), file, revision=revision)
            break
    return Path(str(cached_file(str(source.folder), "config.json", revision=revision))).parent


def described(name: str, revision: str | None, source: Source, dtype: torch.dtype) -> Source:
    """Return the source with its place in the cache and the dtype of its files, whose headers are checked; else that of the model."""
    if source.folder is None:
        return source
    if source.hub:
        file = cached_file(str(source.folder), "config.json", revision=revision)
        source = replace(source, folder=Path(str(file)).parent)
    try:
        stored = stored_in(source)
        return source if source.form else replace(source, dtype=stored.dtype)
    except CheckpointError as error:
        if source.hub:  # weights may be of another revision than the rest
            said = f"the files of {name!r} cannot be written again as they are, so that it is saved as it is in memory: {error}"
            warnings.warn(said, stacklevel=3)
            return replace(source, dtype=source.dtype if source.form else dtype, reshaped=True)
        raise ModelError(f"{name!r} cannot be loaded: {error}") from error
