"""A model whose layers are on its device one at a time, and hidden states that are elsewhere: in memory, or on disk."""

import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from causalprune.core import CheckpointError, Decoder, Layer, Projection, aligned, room
from causalprune.interventions import LayerInputs, replaced_forward
from causalprune.models import Entry, as_saved, dtype_in_memory, raw_bytes
from causalprune.streaming.stored import Sources, fields_of

Leave: TypeAlias = Callable[[Layer], None]
Pair: TypeAlias = tuple[Projection, Bool[Tensor, "out in"]]
HERE = torch.device("cpu")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ResidentProjection(Projection):
    """A projection that is read to the device `home` when its layer is to run."""

    home: torch.device

    @property
    def device(self) -> torch.device:
        """Where `read` gives the matrix, also before it is read."""
        return self.home


class Residence:
    """Lets a model without weights run: what is outside its layers is read at once, a layer when it is to run.

    It stays on the `device` until another one is to run. Layers that are skipped are not read.
    """

    def __init__(
        self, bare: Decoder, sources: Sources, dtype: torch.dtype, device: torch.device = HERE
    ) -> None:
        layers = []
        for layer in bare.layers:
            own = [ResidentProjection(**fields_of(p), home=device) for p in layer.projections]
            layers.append(replace(layer, projections=tuple(own)))
        self.decoder = replace(bare, layers=tuple(layers))
        self._sources, self._dtype, self._device = sources, dtype, device
        self.leave: Leave | None = None
        self.newer: Callable[[Layer], Mapping[str, Tensor]] = lambda layer: {}
        """Values of a layer's parameters by name that take the place of those in the source."""
        self._here: Layer | None = None
        self._absent: list[tuple[nn.Parameter, nn.Parameter]] = []
        """Parameters of the layer at hand, each with what takes its place when it goes."""

    @contextmanager
    def open(self, entries: Mapping[str, Entry], *, head: bool = False) -> Iterator[None]:
        """Read what is outside the layers, and let layers be read when they run, as long as the context lasts.

        The output `head` is read where it is used.
        """
        model, inside = self.decoder.model, tuple(f"{layer.name}." for layer in self.decoder.layers)
        last = model.get_output_embeddings()
        unused = {id(p) for p in last.parameters()} if last is not None and not head else set()
        unused -= {id(p) for p in model.get_input_embeddings().parameters()}
        for name, parameter in model.named_parameters():
            if not name.startswith(inside) and id(parameter) not in unused:
                self._fill(name, parameter)
        self._read_buffers(entries)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        with ExitStack() as stack:
            for layer in self.decoder.layers:
                stack.enter_context(replaced_forward(layer.module, self._entering(layer)))
            yield

    def _entering(self, layer: Layer) -> Callable[..., Any]:
        own = layer.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.bring(layer)
            return own(*args, **kwargs)

        return forward

    def bring(self, layer: Layer) -> None:
        """Let a layer be the one at hand."""
        if self._here is layer:
            return
        self.release()
        newer = self.newer(layer)
        for own, parameter in layer.module.named_parameters():
            name = f"{layer.name}.{own}"
            self._absent.append((parameter, self._fill(name, parameter, newer.get(name))))
        self._here = layer

    def one_by_one(self, keep: Mapping[str, Tensor]) -> Iterator[Pair]:
        """Let every layer be at hand in its turn, and yield its projections with what stays of them."""
        for layer in self.decoder.layers:
            self.bring(layer)
            yield from ((p, keep[p.name]) for p in layer.projections)

    def through(self, pruned: Iterator[Pair], leave: Leave) -> Iterator[Pair]:
        """Pass on what is pruned, and let every layer `leave` when the next one comes, and in the end."""
        self.leave = leave
        yield from pruned
        self.release()

    def release(self) -> None:
        """Let the layer at hand go, if there is one."""
        if self._here is not None and self.leave is not None:
            self.leave(self._here)
        for parameter, absent in self._absent:
            absent.requires_grad_(parameter.requires_grad)
            torch.utils.swap_tensors(parameter, absent)
        self._here, self._absent = None, []

    def _fill(self, name: str, parameter: nn.Parameter, newer: Tensor | None = None) -> nn.Parameter:
        """Give a parameter its values, and return what it was without."""
        parts, dtype = self._sources[name], dtype_in_memory(self.decoder.model, name, self._dtype)
        with torch.inference_mode(False):  # it is changed in place later
            if newer is not None:
                values = newer.to(self._device, copy=True)
            elif len(parts) == 1:
                values = aligned(parts[0].read().to(dtype)).to(self._device)
            else:
                values = torch.empty(parameter.shape, dtype=dtype, device=self._device)
                for p, entry in zip(self.views(name), parts, strict=True):
                    whole = nn.Parameter(values, requires_grad=False)
                    replace(p, parameter=whole).write(entry.read())
            other = nn.Parameter(values, requires_grad=parameter.requires_grad)
            torch.utils.swap_tensors(parameter, other)
        return other

    def views(self, name: str) -> list[Projection]:
        """Return the projections that share a parameter, in their order."""
        return [p for p in self.decoder.projections if p.parameter_name == name]

    def _read_buffers(self, entries: Mapping[str, Entry]) -> None:
        """Read the buffers that files hold beside weights."""
        model, stored = self.decoder.model, self.decoder.model.state_dict().keys()
        prefix = f"{model.base_model_prefix}."
        for name, buffer in model.named_buffers():
            if name not in stored:
                continue
            own = next(iter(as_saved(model, {name: buffer})))
            names = [name, prefix + name, name.removeprefix(prefix), own, prefix + own]
            found = next((entries[n] for n in names if n in entries), None)
            if found is None or found.shape != tuple(buffer.shape):
                raise CheckpointError(
                    f"{name} is not in the checkpoint: prune it in memory, without --stream"
                )
            dtype = dtype_in_memory(model, name, buffer.dtype)
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, found.read().to(dtype))

    def pieces(self, layer: Layer) -> Iterator[tuple[Entry, Any]]:
        """Yield the places in files of a layer's prunable weights, with the bytes that they have now."""
        for name in dict.fromkeys(p.parameter_name for p in layer.projections):
            parts, views = self._sources[name], self.views(name)
            if len(parts) == 1:
                yield parts[0], raw_bytes(views[0].parameter)
            else:
                yield from ((entry, raw_bytes(p.read())) for p, entry in zip(views, parts, strict=True))


class HiddenStates:
    """Keeps inputs of layers in memory up to a limit, and beyond it in files without a name, as long as somebody has them.

    They come to the `device` when they are looked at.
    """

    def __init__(self, limit_bytes: float, folder: Path, device: torch.device = HERE) -> None:
        self._limit, self._folder, self._device, self._here = limit_bytes, folder, device, 0
        self._files: dict[int, IO[bytes]] = {}
        self._users: Counter[int] = Counter()
        """Inputs of each layer that are in its file."""
        self.spilled_bytes = 0
        """Written to disk so far."""

    def keep(self, inputs: LayerInputs) -> LayerInputs:
        """Return the same inputs, which may be on disk now."""
        ((layer, hidden),) = inputs.hidden.items()
        size = hidden.numel() * hidden.element_size()
        if self._here <= self._limit and self._limit:  # one more, as it mostly takes the place of another
            self._here += size
            if self._device != HERE:
                inputs = LayerInputs(_Elsewhere(layer, _InMemory(hidden), self._device), inputs.as_tuple)
            weakref.finalize(inputs, self._leave, size)
            return inputs
        if not self.spilled_bytes:
            limit = f"{self._limit / 2**30:g} GiB"
            message = (
                f"hidden states do not fit into {limit}: the rest of them is kept on disk, in {self._folder}"
            )
            warnings.warn(message, stacklevel=2)
        self.spilled_bytes += size
        if layer not in self._files:
            self._files[layer] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed when nobody needs it)
        self._users[layer] += 1
        where = _OnDisk(hidden, self._files[layer])
        kept = LayerInputs(_Elsewhere(layer, where, self._device), inputs.as_tuple)
        weakref.finalize(kept, self._close, layer)
        return kept

    def _leave(self, size: int) -> None:
        self._here -= size

    def _close(self, layer: int) -> None:
        self._users[layer] -= 1
        if not self._users[layer]:
            self._files.pop(layer).close()

    def close(self) -> None:
        """Forget everything."""
        for file in self._files.values():
            file.close()


class _InMemory:
    """A tensor of a device, in memory."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden.cpu()

    def read(self) -> Tensor:
        return self._hidden


class _OnDisk:
    """A tensor in a file."""

    def __init__(self, hidden: Tensor, file: IO[bytes]) -> None:
        self._file, self._dtype, self._shape = file, hidden.dtype, hidden.shape
        self._at = file.seek(0, 2)
        file.write(raw_bytes(hidden))

    def read(self) -> Tensor:
        data = room(self._shape.numel() * self._dtype.itemsize)
        self._file.seek(self._at)
        self._file.readinto(data.numpy())  # type: ignore[attr-defined]
        return data.view(self._dtype).view(self._shape)


class _Elsewhere(Mapping[int, Tensor]):
    """The input of one layer, which comes to a device when it is looked at."""

    def __init__(self, layer: int, where: _InMemory | _OnDisk, device: torch.device) -> None:
        self._layer, self._where, self._device = layer, where, device

    def __getitem__(self, layer: int) -> Tensor:
        if layer != self._layer:
            raise KeyError(layer)
        return self._where.read().to(self._device)

    def __iter__(self) -> Iterator[int]:
        return iter([self._layer])

    def __len__(self) -> int:
        return 1
