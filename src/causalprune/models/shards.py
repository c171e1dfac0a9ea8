"""Safetensors files as regions of bytes: checked, read and written without holding a whole file.

A file is eight bytes of header length, a JSON header, and the tensors one after the other without gaps
(https://huggingface.co/docs/safetensors). A tensor here is its place in a file; what memory it costs is decided
by whoever reads it.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from causalprune.core import CheckpointError, room

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
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: bytes `start` to `stop` of the file, counted from its beginning; in a copy, `shift` further on."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    shift: int = 0

    @property
    def place(self) -> int:
        """Where the tensor begins in a copy of the file."""
        return self.start + self.shift

    def part(self, index: int) -> "Entry":
        """Return one matrix of a stack, as a tensor of its own."""
        size = (self.stop - self.start) // self.shape[0]
        start = self.start + index * size
        return replace(self, shape=self.shape[1:], start=start, stop=start + size)

    def read(self) -> Tensor:
        """Return the tensor, read from the file."""
        data = room(self.stop - self.start)
        raw: Any = data.numpy()
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            _fill(file, memoryview(raw), self)
        return data.view(self.dtype).view(self.shape)

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield pieces of the tensor's bytes with their places in a copy; each is overwritten by the next."""
        buffer = memoryview(bytearray(min(CHUNK, self.stop - self.start)))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for at in range(self.start, self.stop, CHUNK):
                piece = buffer[: min(CHUNK, self.stop - at)]
                _fill(file, piece, self)
                yield at + self.shift, piece


@dataclass(frozen=True)
class Made(Entry):
    """A tensor that files hold in another form; `start` to `stop` is where it will be in a copy."""

    parts: tuple[Entry, ...] = ()
    unpack: Callable[..., Tensor] = torch.clone

    def part(self, index: int) -> Entry:
        """Return one matrix of a stack, as a tensor of its own."""
        parts = tuple(entry.part(index) for entry in self.parts)
        return replace(super().part(index), parts=parts)  # type: ignore[call-arg]

    def read(self) -> Tensor:
        """Return the tensor, made from its parts."""
        return self.unpack(*(entry.read() for entry in self.parts)).to(self.dtype).contiguous()

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the tensor's bytes with their place in a copy."""
        yield self.start, memoryview(raw_bytes(self.read()))


def _fill(file: Any, room: memoryview, entry: Entry) -> None:
    done = 0
    while done < len(room):
        count = file.readinto(room[done:])
        if not count:
            raise CheckpointError(f"{entry.file} ends inside {entry.name}: fetch it again")
        done += count


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


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of the model, which may be a link into the Hub's cache and nowhere else."""
    file = folder / name
    if not file.exists():
        raise CheckpointError(f"{file} is missing: fetch it again")
    home, target = folder.resolve(), file.resolve()
    if target.parent != home and not in_cache(home, target):
        raise CheckpointError(f"{file} is a link to {target}, outside the model: put the file itself there")
    return file


def in_cache(home: Path, target: Path) -> bool:
    """Tell whether a file is where the Hub's cache has those of the snapshot `home`: beside it, or shared by all models."""
    if target.parent == home.parent.parent / "blobs":
        return True
    snapshot = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    return snapshot and target.parent.parent == home.parents[2] / "blobs"


AT_ONCE = 2**26
"""Bytes written before the disk begins to have them: one that is idle until the end is waited for then."""


class ShardWriter:
    """A safetensors file whose tensors are written one by one, in any order, into their final places."""

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._disk, self._waiting = ThreadPoolExecutor(1), 0
        self._going: Future[None] | None = None
        self.write(0, header)
        os.ftruncate(self._fd, size)

    def write(self, at: int, data: Buffer) -> None:
        """Write bytes at a place of the file."""
        view = memoryview(data).cast("B")
        self._waiting += len(view)
        while view:
            count = os.pwrite(self._fd, view, at)
            view, at = view[count:], at + count
        if self._waiting > AT_ONCE and (self._going is None or self._going.done()):
            self._settle()
            durable = getattr(os, "fdatasync", os.fsync)  # macOS has the second alone
            self._going, self._waiting = self._disk.submit(durable, self._fd), 0

    def close(self) -> None:
        """Make the file durable."""
        try:
            self._settle()
            os.fsync(self._fd)
        finally:
            self._disk.shutdown()
            os.close(self._fd)

    def _settle(self) -> None:
        """Raise what the disk has said of earlier bytes: it says so once, and no later call hears of it."""
        if self._going is not None:
            self._going.result()


def raw_bytes(weight: Tensor) -> Any:
    """Return the bytes of a tensor as an array, in row-major order."""
    return weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Return header, place of each tensor and size of a file of tensors with these dtypes and shapes.

    The widest come first, so that each begins at a multiple of its values' bytes.
    """
    rows: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda row: -row[1][0].itemsize):
        size = math.prod(shape) * dtype.itemsize
        rows[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(rows, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    places = {name: base + rows[name]["data_offsets"][0] for name in tensors}
    return struct.pack("<Q", len(text)) + text, places, base + at
