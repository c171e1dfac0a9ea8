"""Safetensors files as regions of bytes: checked, read and written without holding a whole file.

A file is eight bytes of header length, a JSON header, and the tensors one after the other without gaps
(https://huggingface.co/docs/safetensors). A tensor here is its place in a file; what memory it costs is decided
by whoever reads it.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from causalprune.core import CheckpointError, room

INDEX, SUFFIX = "model.safetensors.index.json", ".safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
Buffer: TypeAlias = Any  # bytes, or what a memoryview can be made of
MAX_HEADER = 100 * 2**20
CHUNK = 16 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: bytes `start` to `stop` of the file, counted from its beginning."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def part(self, index: int) -> "Entry":
        """Return one matrix of a stack, as a tensor of its own."""
        size = (self.stop - self.start) // self.shape[0]
        start = self.start + index * size
        return Entry(self.name, self.file, self.dtype, self.shape[1:], start, start + size)

    def read(self) -> Tensor:
        """Return the tensor, read from the file."""
        data = room(self.stop - self.start)
        raw: Any = data.numpy()
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            _fill(file, memoryview(raw), self)
        return data.view(self.dtype).view(self.shape)

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield pieces of the tensor's bytes with their places in the file; each is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK, self.stop - self.start)))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for at in range(self.start, self.stop, CHUNK):
                piece = buffer[: min(CHUNK, self.stop - at)]
                _fill(file, piece, self)
                yield at, piece


def _fill(file: Any, room: memoryview, entry: Entry) -> None:
    done = 0
    while done < len(room):
        count = file.readinto(room[done:])
        if not count:
            raise CheckpointError(f"{entry.file} ends inside {entry.name}: fetch it again")
        done += count


def open_checkpoint(folder: Path) -> tuple[list[Path], dict[str, Entry]]:
    """Return the weight files of a model folder and every tensor in them, all headers checked.

    Raises:
        CheckpointError: a file is missing, damaged, or lies elsewhere; the index does not fit; there are only pickles.
    """
    where = _read_index(folder / INDEX) if (folder / INDEX).exists() else {}
    files = [inside(folder, name) for name in sorted(set(where.values())) or _single(folder)]
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in entries:
                raise CheckpointError(f"{entry.name} is both in {entries[entry.name].file} and in {file}")
            entries[entry.name] = entry
    for name, file_name in where.items():
        if name not in entries or entries[name].file.name != file_name:
            raise CheckpointError(
                f"{folder / INDEX} says that {name} is in {file_name}, and it is not: fetch both again"
            )
    return files, entries


def check_places(folder: Path) -> None:
    """Raise `CheckpointError` if weight files of a local folder lie outside it, by a link or by what an index says."""
    names = {f"model{SUFFIX}"}
    if (folder / INDEX).exists():
        names |= set(_read_index(folder / INDEX).values())
    for name in sorted(names):
        if (folder / name).exists():
            inside(folder, name)


def _single(folder: Path) -> list[str]:
    """Return the name of the only weight file in a folder without an index."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: streaming needs a local folder with safetensors files"
        )
    names = [p.name for p in folder.glob("*.safetensors") if p.name != "keep_masks.safetensors"]
    if not names:
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        hint = f"; {pickles[0]} is a pickle, which can run code: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder} has no safetensors files{hint}")
    if len(names) > 1:
        raise CheckpointError(f"{folder} has {len(names)} safetensors files and no {INDEX}: fetch it again")
    return names


def read_header(file: Path) -> list[Entry]:
    """Return the tensors of a file in the order of their bytes, after checking that they fill it exactly."""
    try:
        size = file.stat().st_size
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{file} is no safetensors file, or cut short: fetch it again")
            header = json.loads(source.read(length), object_pairs_hook=_distinct)
        entries = [_entry(n, row, file, 8 + length) for n, row in header.items() if n != "__metadata__"]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error!r:.200}): fetch it again") from error
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    at = 8 + length
    for entry in entries:
        if entry.start != at:
            raise CheckpointError(
                f"{file}: {entry.name} begins at byte {entry.start} instead of {at}: fetch it again"
            )
        at = entry.stop
    if at != size:
        raise CheckpointError(f"{file} holds {size:,} bytes, and its header speaks of {at:,}: fetch it again")
    return entries


def _entry(name: str, row: Any, file: Path, base: int) -> Entry:
    start, stop = row["data_offsets"]
    shape, dtype = tuple(row["shape"]), DTYPES[row["dtype"]]
    numbers = (start, stop, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name}: shape and offsets must be whole numbers")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {stop - start} bytes for shape {list(shape)} of {row['dtype']}")
    return Entry(name, file, dtype, shape, base + start, base + stop)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor; each must be a plain name in the index's own folder."""
    try:
        where: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
        strange = [name for name in where.values() if Path(name).name != name or Path(name).suffix != SUFFIX]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.200}): fetch it again") from error
    if strange or not where:
        raise CheckpointError(
            f"{path} names {strange[:1] or 'nothing'}, which is no safetensors file in that folder"
        )
    return where


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of the model, which may be a link into the Hub's cache and nowhere else."""
    file = folder / name
    if not file.exists():
        raise CheckpointError(f"{file} is missing: fetch it again")
    home, target = folder.resolve(), file.resolve()
    if target.parent not in (home, home.parent.parent / "blobs"):
        raise CheckpointError(f"{file} is a link to {target}, outside the model: put the file itself there")
    return file


class ShardWriter:
    """A safetensors file whose tensors are written one by one, in any order, into their final places."""

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.write(0, header)
        os.ftruncate(self._fd, size)

    @staticmethod
    def like(source: Path, path: Path) -> "ShardWriter":
        """Return the writer of a file with the same tensors in the same places as `source`."""
        with source.open("rb") as file:
            first = file.read(8)
            header = first + file.read(struct.unpack("<Q", first)[0])
        return ShardWriter(path, header, source.stat().st_size)

    def write(self, at: int, data: Buffer) -> None:
        """Write bytes at a place of the file."""
        view = memoryview(data).cast("B")
        while view:
            count = os.pwrite(self._fd, view, at)
            view, at = view[count:], at + count

    def close(self) -> None:
        """Make the file durable."""
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)


def layout(sizes: Mapping[str, int], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return header, place of each tensor and size of a file of byte vectors of these sizes."""
    rows: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, size in sizes.items():
        rows[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(rows, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    places = {name: base + rows[name]["data_offsets"][0] for name in sizes}
    return struct.pack("<Q", len(text)) + text, places, base + at
