"""A GPU that is pretended: tensors stay on the CPU, and those that would be on the GPU are told apart and kept apart.

What only a GPU shows otherwise, tensors of two devices in one operation, becomes an error everywhere. Rounding and speed of a
GPU are not imitated.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ACROSS = ("aten::copy_", "aten::_to_copy")
INDEXED = (
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
)
"""What takes indices that lie on the CPU."""


class MixedError(RuntimeError):
    """Tensors of two devices came together in one operation."""


class Places:
    """Which tensors are on the GPU: those whose storage is noted."""

    def __init__(self) -> None:
        self._there: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def has(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is on the GPU."""
        with torch._C.DisableTorchFunction():
            return not tensor.is_meta and tensor.untyped_storage() in self._there

    def put(self, tensor: Tensor) -> None:
        """Note that a tensor, and all that share its storage, are on the GPU."""
        with torch._C.DisableTorchFunction():
            if not tensor.is_meta:
                self._there.add(tensor.untyped_storage())

    def moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor on a device: itself where it is there."""
        if tensor.is_meta or self.has(tensor) == (device.type == "cuda"):
            return tensor
        return _Moved.apply(tensor, self, device.type == "cuda")


class _Moved(torch.autograd.Function):
    """A copy on the other device, through which slopes go back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Places, there: bool) -> Tensor:
        ctx.places, ctx.there = places, there
        with _unwatched():
            copy = tensor.detach().clone()
        if there:
            places.put(copy)
        return copy

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        with _unwatched():
            copy = slope.clone()
        if not ctx.there:
            ctx.places.put(copy)
        return copy, None, None


@contextmanager
def _unwatched() -> Iterator[None]:
    """Let operations pass that no GPU would see."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


class _Apart(TorchDispatchMode):
    """Keeps tensors of two devices apart, and notes where results are."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        given = args[0] if name in INDEXED and isinstance(args[0], Tensor) else (args, kwargs)
        tensors = [
            own
            for own in tree_leaves((given, args[2:]) if name in INDEXED else given)
            if isinstance(own, Tensor)
        ]
        there = [own for own in tensors if self._places.has(own)]
        rest = [own for own in tensors if own.dim() and not own.is_meta and not self._places.has(own)]
        if (
            name in INDEXED
            and not there
            and any(self._places.has(own) for own in tree_leaves(args[1]) if isinstance(own, Tensor))
        ):
            raise MixedError(f"{name}: indices on the GPU, and what they choose from on the CPU")
        if there and rest and name not in ACROSS:
            raise MixedError(
                f"{name}: {[tuple(own.shape) for own in there]} on the GPU, {[tuple(own.shape) for own in rest]} on the CPU"
            )
        if name == "aten::histc" and there:  # of whole numbers too, on a GPU
            args = args[0].float(), *args[1:]
        found = func(*args, **(kwargs or {}))
        if there and name not in ACROSS:
            for own in tree_leaves(found):
                if isinstance(own, Tensor):
                    self._places.put(own)
        elif name == "aten::_to_copy" and there:
            self._places.put(found)
        return found


class _Asked(TorchFunctionMode):
    """Answers where tensors are, and moves and makes them there."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places
        self._own: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda own: (
                GPU if places.has(own) else self._plain(Tensor.device.__get__, own)
            ),
            Tensor.is_cuda.__get__: places.has,
            Tensor.is_cpu.__get__: lambda own: not own.is_meta and not places.has(own),
            Tensor.cpu: lambda own, **_: places.moved(own, CPU),
            Tensor.cuda: lambda own, *_, **__: places.moved(own, GPU),
            Tensor.to: self._to,
            Tensor.numpy: self._numpy,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._own:
            return self._own[func](*args, **kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = torch.device(kwargs["device"])
        if device.type == "meta":
            return func(*args, **kwargs)
        with _unwatched():
            found = func(*args, **(kwargs | {"device": CPU}))
        if device.type == "cuda":
            self._places.put(found)
        return found

    @staticmethod
    def _plain(func: Any, own: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return func(own)

    def _to(self, own: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest, names, device = list(args), ["dtype", "non_blocking", "copy"], kwargs.pop("device", None)
        if rest and isinstance(rest[0], Tensor):
            like = rest.pop(0)
            rest, device = [like.dtype, *rest], GPU if self._places.has(like) else like.device
        elif rest and not isinstance(rest[0], torch.dtype):
            device = rest.pop(0)
        kwargs |= {name: value for name, value in zip(names, rest, strict=False) if value is not None}
        device = None if device is None else torch.device(device)
        if device is not None and (device.type == "meta" or own.is_meta):
            return Tensor.to(own, device=device, **kwargs)
        found = own if device is None else self._places.moved(own, device)
        if found is not own:
            kwargs.pop("copy", None)
        return Tensor.to(found, **kwargs) if kwargs else found

    def _numpy(self, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._places.has(own):
            raise TypeError("a tensor on the GPU cannot become an array")
        return Tensor.numpy(own, *args, **kwargs)


class _Generator(torch.Generator):
    """Makes generators of the CPU for every device."""

    def __new__(cls, device: object = "cpu") -> Any:
        return torch._C.Generator()


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """Let there be a GPU, as long as the context lasts."""
    places = Places()
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (psutil.virtual_memory().available,) * 2)
    with _Apart(places), _Asked(places):
        yield places
