"""Room for large matrices, counting their zeros, keep masks at eight weights a byte, and going on where memory runs out."""

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from causalprune.core.bits import bands, bits_of
from causalprune.core.types import Effects

Found = TypeVar("Found")
CACHE_LINE = 64
MEMBER, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux says in which control groups a process is, and what they are."""
BEFORE = "memory.limit_in_bytes", "memory.usage_in_bytes"
"""What the limit and what is taken of it are called in the first version of control groups."""
NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""What errors of CUDA, of torch on a CPU, and of cuBLAS say."""


def free_bytes(device: torch.device) -> float:
    """Return the memory that a device has left; without bound where nobody can tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier work has left there counts as free
        return float(torch.cuda.mem_get_info(device)[0])
    return min(float(psutil.virtual_memory().available), _granted()) if device.type == "cpu" else math.inf


def _granted() -> float:
    """Return what the control groups that this process is in, as a container's, leave it of the memory; without bound where none is set."""
    try:
        lines = [line.split(":", 2) for line in MEMBER.read_text().splitlines()]
        own = {kind: path for _, kinds, path in lines for kind in kinds.split(",")}
    except (OSError, ValueError):
        return math.inf
    found = [math.inf]
    for kind, most, used in (("", "memory.max", "memory.current"), ("memory", *BEFORE)):
        root = GROUPS / kind
        place = root / own.get(kind, "/").lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(root):
                with contextlib.suppress(OSError, ValueError):  # where there is no limit it says max
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    files = int(
                        stat.get("total_inactive_file", stat.get("inactive_file", 0))
                    )  # goes when somebody needs the room
                    found.append(int((folder / most).read_text()) - int((folder / used).read_text()) + files)
    return float(max(min(found), 0.0))


def room(size: int) -> UInt8[Tensor, "byte"]:
    """Return bytes on the CPU that are yet to be written.

    In large pages, unlike torch's own: reading a file into them takes a third of the time.
    """
    return torch.from_numpy(np.empty(size, np.uint8))


def zeros_in(weight: Float[Tensor, "out in"]) -> int:
    """Count the weights that are zero, of either sign: by their bits, several times faster than by value."""
    bits = bits_of(weight)
    unsigned = torch.iinfo(bits.dtype).max
    rest = (int(np.count_nonzero((bits[band] & unsigned).cpu().numpy())) for band in bands(weight))
    return weight.numel() - sum(rest)


def aligned(tensor: Tensor) -> Tensor:
    """Return the same values at an address where cache lines begin, a copy if need be.

    The last bits of a product depend on the address (MKL), and files begin tensors anywhere.
    """
    return tensor.clone() if tensor.data_ptr() % CACHE_LINE else tensor


def packed(keep: Bool[Tensor, "out in"]) -> Any:
    """Return the bits of a mask, row by row, as an array of bytes."""
    return np.packbits(keep.cpu().numpy())


def unpacked(data: Any, shape: tuple[int, int]) -> Bool[Tensor, "out in"]:
    """Return the mask of a shape that was packed into `data`, on the CPU."""
    return torch.from_numpy(np.unpackbits(data, count=shape[0] * shape[1]).view(bool)).view(shape)


class Masks(Mapping[str, Tensor]):
    """What stays of every projection: a mask `[out in]` is unpacked whenever it is asked for, on its device."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Any, tuple[int, int], torch.device]] = {}

    def add(self, name: str, keep: Bool[Tensor, "out in"]) -> None:
        """Take note of what stays of a projection."""
        out, into = keep.shape
        self._packed[name] = packed(keep), (out, into), keep.device

    def stored(self) -> dict[str, UInt8[Tensor, "byte"]]:
        """Return the bits of every mask, as `unpacked` takes them."""
        return {name: torch.from_numpy(data) for name, (data, *_) in self._packed.items()}

    def counted(self) -> list[dict[str, Any]]:
        """Return `name`, `weights` and `zeros` of every projection: those that do not stay."""
        found = []
        for name, (data, (out, into), _) in self._packed.items():
            stays = int.from_bytes(data.tobytes(), "little").bit_count()
            found.append({"name": name, "weights": out * into, "zeros": out * into - stays})
        return found

    def __getitem__(self, name: str) -> Bool[Tensor, "out in"]:
        data, shape, device = self._packed[name]
        return unpacked(data, shape).to(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


@runtime_checkable
class Made(Protocol):
    """What was done to a model, as `save` writes it down: masks, effects that it rests on, and an entry of the manifest."""

    @property
    def keep(self) -> Mapping[str, Bool[Tensor, "_ _"]] | None:
        """Masks, True where a weight stays, of what has zeros."""

    @property
    def effects(self) -> Effects | None:
        """What was measured for it."""

    def record(self) -> dict[str, Any]:
        """Return what the manifest says of it."""


def out_of_memory(error: BaseException) -> bool:
    """Tell whether a device, or this machine, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in NO_MEMORY)


class AtOnce:
    """Works on as many sequences at once as fit `tokens`; half as many from where memory runs out, with a warning."""

    def __init__(self, tokens: int = sys.maxsize) -> None:
        self.tokens = tokens

    def __call__(self, count: int, width: int, work: Callable[[list[int]], Found]) -> list[Found]:
        """Return what `work` finds for sequences 0 to `count`, `width` tokens each, some at a time.

        Raises:
            RuntimeError: there is no memory for a single one.
        """
        found: list[Found] = []
        start = 0
        while start < count:
            rows = list(range(start, min(count, start + max(1, self.tokens // width))))
            try:
                found.append(work(rows))
            except RuntimeError as error:
                if not out_of_memory(error) or len(rows) == 1:
                    raise
                fewer = len(rows) // 2
                self.tokens = fewer * width
                warnings.warn(
                    f"out of memory with {len(rows)} sequences at once: going on with {fewer}", stacklevel=2
                )
            else:
                start += len(rows)
        return found
