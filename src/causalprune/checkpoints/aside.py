"""Large tables beside a JSON file: as text they would take several times the room, and minutes to read."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalprune.core import CheckpointError, sync

LARGE = 250_000
"""Numbers from which on a table is large."""
SUFFIX = ".values"


def put_aside(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Write the large ones of these tensors beside `path`, and return what its JSON says of them; nothing where none is large."""
    found, parts, at = dict[str, Any](), list[bytes](), 0
    for name, tensor in tensors.items():
        if tensor.numel() > LARGE:
            parts.append(tensor.contiguous().numpy().tobytes())
            dtype = str(tensor.dtype).removeprefix("torch.")
            found[name] = {"dtype": dtype, "shape": list(tensor.shape), "at": at}
            at += len(parts[-1])
    if not found:
        return {}
    data, file = b"".join(parts), path.with_suffix(SUFFIX)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(file)
    return {**found, "aside": {"file": file.name, "sha256": hashlib.sha256(data).hexdigest()}}


def aside_of(path: Path, record: Mapping[str, Any]) -> bytes:
    """Return the bytes that lie beside a file whose JSON is `record`; none where nothing does.

    Raises:
        CheckpointError: the file is missing, or is another one.
    """
    if "aside" not in record:
        return b""
    file = path.with_name(record["aside"]["file"])
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}, which belongs to {path}, cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != record["aside"]["sha256"]:
        raise CheckpointError(f"{file} does not belong to {path}, or is damaged: make both again")
    return data


def taken_from(data: bytes, entry: Mapping[str, Any]) -> Tensor:
    """Return a tensor from the bytes that were put aside."""
    size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
    part = np.frombuffer(data[entry["at"] : entry["at"] + size], dtype=entry["dtype"])
    return torch.from_numpy(part.reshape(entry["shape"]).copy())
