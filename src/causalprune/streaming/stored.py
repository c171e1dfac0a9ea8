"""Where the weights of a model are among the tensors of its files, and projections that are read from there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune.core import CheckpointError, Decoder, Layer, Progress, Projection, say
from causalprune.models import Entry, Made, ShardWriter, as_saved, expert_weight, raw_bytes, wrapped

Sources: TypeAlias = Mapping[str, Sequence[Entry]]
"""Where the values of each parameter of a model are, in their order."""


class Store:
    """The stored matrix at hand: read from the source, written to its place in the copy when the next is wanted.

    While one is at work the next in `order` is being read, and the one before it written.
    """

    def __init__(self, total: int, on_progress: Progress) -> None:
        self.writers: dict[Path, ShardWriter] = {}
        self.changed = False
        self.order: Mapping[Entry, Entry] = {}
        """The entry that will be wanted after each."""
        self._at: Entry | None = None
        self._matrix = torch.empty(0)
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._coming: tuple[Entry, Future[Tensor]] | None = None
        self._going: Future[None] | None = None
        self._done, self._total, self.on_progress = 0, total, on_progress

    def get(self, entry: Entry) -> Tensor:
        """Return the matrix at `entry`, the same tensor as long as no other is asked for."""
        if self._at != entry:
            self._put()
            ready = self._coming is not None and self._coming[0] == entry
            self._matrix = self._coming[1].result() if ready and self._coming else entry.read()
            self._at, after = entry, self.order.get(entry)
            self._coming = None if after is None else (after, self._reader.submit(after.read))
            self.report(entry)
        return self._matrix

    def _put(self) -> None:
        if self._at is not None and self.changed:
            self.wait()
            write = self.writers[self._at.file].write
            self._going = self._writer.submit(write, self._at.place, raw_bytes(self._matrix))
        self.changed, self._at = False, None

    def wait(self) -> None:
        """Return when what was written before is written."""
        if self._going is not None:
            self._going.result()
            self._going = None

    def flush(self) -> None:
        """Write the matrix at hand if it was changed."""
        self._put()
        self.wait()

    def follow(self, entries: Iterable[Entry]) -> None:
        """Take note of the order in which matrices will be wanted."""
        order = list(dict.fromkeys(entries))
        self.order = dict(pairwise(order))

    def settle(self) -> None:
        """Let what is being written end, well or badly: its file is about to be closed."""
        if self._going is not None:
            wait([self._going])

    def close(self) -> None:
        """End reading ahead and writing behind."""
        for pool in (self._reader, self._writer):
            pool.shutdown(cancel_futures=True)

    def copy(self, entry: Entry) -> None:
        """Copy a tensor bit for bit."""
        for at, piece in entry.chunks():
            self.writers[entry.file].write(at, piece)
        self.report(entry)

    def report(self, entry: Entry) -> None:
        """Count the bytes of a tensor that was read."""
        self._done = min(self._done + entry.stop - entry.start, self._total)
        say(self.on_progress, count=f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB")
        self.on_progress(self._done, self._total)


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredProjection(Projection):
    """A projection whose weights are in a file; its `parameter` has a shape, and no values."""

    store: Store
    entry: Entry

    def stored(self) -> Float[Tensor, "_ _"]:
        """Return the stored matrix, read from the file."""
        return self.store.get(self.entry)

    def write(self, weight: Float[Tensor, "out in"]) -> None:
        """Change the matrix at hand, which the store writes to the copy."""
        super().write(weight)
        self.store.changed = True

    def erase(self, keep: Bool[Tensor, "out in"]) -> None:
        """Set weights of the matrix at hand to zero, which the store writes to the copy."""
        super().erase(keep)
        self.store.changed = True


def find_sources(bare: Decoder, entries: Mapping[str, Entry]) -> Sources:
    """Find the values of every parameter: under its name, with or without the prefix of the base model, or in parts."""
    found: dict[str, Sequence[Entry]] = {}
    if shared := next((p for p in bare.projections if p.uses), None):
        raise CheckpointError(
            f"{shared.parameter_name} is used by several layers: prune it in memory, without --stream"
        )
    if other := wrapped(entries.keys() - dict(bare.model.named_parameters()).keys()):
        raise CheckpointError(f"{bare.name!r} {other}")
    for name, parameter in bare.model.named_parameters():
        exact = _named(bare, name, entries)
        found[name] = [entry for entry in exact if entry.shape == tuple(parameter.shape)][:1]
    taken = {entry.name for parts in found.values() for entry in parts}
    ignored = getattr(bare.model, "_keys_to_ignore_on_load_unexpected", None) or ()
    taken |= {n for n in entries if any(re.search(own, n) for own in ignored)}  # other blocks, as for MTP
    for name, parts in found.items():
        if parts:
            continue
        shape = tuple(bare.model.get_parameter(name).shape)
        left = {n: entry for n, entry in entries.items() if n not in taken}
        found[name] = _converted(bare, name, entries) or _renamed(bare.layers, name, shape, left)
        if not found[name]:
            raise CheckpointError(
                f"{name} {list(shape)} is not in the checkpoint under a name that can be streamed: "
                "prune it in memory, without --stream"
            )
    return found


def _named(bare: Decoder, name: str, entries: Mapping[str, Entry]) -> list[Entry]:
    """Return what files hold under a name, with or without the prefix of the base model."""
    prefix = f"{bare.model.base_model_prefix}."
    return [entries[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in entries]


def untie(bare: Decoder, entries: Mapping[str, Entry]) -> None:
    """Give a model a head of its own where its configuration ties it and files hold another, as transformers does."""
    tied: dict[str, str] = bare.model.all_tied_weights_keys
    for name, origin in list(tied.items()):
        own, other = _named(bare, name, entries), _named(bare, origin, entries)
        if (
            own
            and other
            and not all(
                bytes(a) == bytes(b)
                for (_, a), (_, b) in zip(own[0].chunks(), other[0].chunks(), strict=False)
            )
        ):
            del tied[name]
            path, _, leaf = name.rpartition(".")
            parameter = bare.model.get_parameter(name)
            bare.model.get_submodule(path).register_parameter(
                leaf, nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            )


def _converted(bare: Decoder, name: str, entries: Mapping[str, Entry]) -> list[Entry]:
    """Return what transformers makes a parameter of: one tensor under another name, or blocks of rows of one left whole."""
    prefix, value = f"{bare.model.base_model_prefix}.", bare.model.get_parameter(name).data.to("meta")

    def found(parts: Mapping[str, Tensor]) -> list[Entry]:
        own = [next((entries[n] for n in (part, prefix + part) if n in entries), None) for part in parts]
        return [
            e
            for e, part in zip(own, parts.values(), strict=True)
            if e is not None and e.shape == tuple(part.shape)
        ]

    apart = as_saved(bare.model, {name: value})
    known = found(apart)
    if len(known) < len(apart) or (
        any(p.parameter_name == name for p in bare.projections) and len(apart) > 1
    ):
        return []
    if len(apart) == 1:
        return known if next(iter(apart.values())) is value else []
    numbers = torch.arange(value.numel()).view(value.shape)
    again = as_saved(bare.model, {name: numbers})
    if not torch.equal(torch.cat(list(again.values())), numbers):
        return []
    size = sum(e.stop - e.start for e in known)
    first = known[0]
    return [
        Made(name, first.file, first.dtype, tuple(value.shape), 0, size, parts=tuple(known), unpack=_joined)
    ]


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _renamed(
    layers: Sequence[Layer], name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]
) -> list[Entry]:
    """Find a parameter under another name: in its layer, or as the only one of its shape outside all layers."""
    for layer in layers:
        if name.startswith(f"{layer.name}."):
            ending = ".".join(layer.name.split(".")[-2:])  # what stands before may be called otherwise
            found = (re.match(rf"(?:.*\.)?{re.escape(ending)}\.", n) for n in entries)
            names = [(hit.string[hit.end() :], hit.string) for hit in found if hit]
            own = {rest: entries[whole] for rest, whole in names}
            return _in_layer(layer, name, shape, own) if len(own) == len(names) else []
    outside = [e for n, e in entries.items() if not any(n.startswith(f"{layer.name}.") for layer in layers)]
    alike = [entry for entry in outside if entry.shape == shape]
    return alike if len(alike) == 1 else []


def _in_layer(layer: Layer, name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]) -> list[Entry]:
    """Return the matrices that a stack of experts is saved as, or the one tensor that was only renamed."""
    views = [p for p in layer.projections if p.parameter_name == name]
    if views and views[0].expert is not None:
        paths = {expert_weight(n): e for n, e in entries.items()}
        parts = [paths.get((p.expert or 0, p.role)) for p in views]
        plain = not any(p.transposed or (isinstance(p.rows, slice) and p.rows.step) for p in views)
        fit = [e for e, p in zip(parts, views, strict=True) if e is not None and e.shape == p.shape]
        return fit if plain and len(fit) == len(views) else []
    ending = name.split(".")[-2:]
    alike = [e for n, e in entries.items() if n.split(".")[-2:] == ending and e.shape == shape]
    return alike if len(alike) == 1 else []


def fields_of(p: Projection) -> dict[str, Any]:
    """Return what a projection is made of, for one of another kind."""
    return {name: getattr(p, name) for name in Projection.__dataclass_fields__}


def with_stored(bare: Decoder, sources: Sources, store: Store) -> Decoder:
    """Return the decoder with projections that are read from files."""
    layers = []
    for layer in bare.layers:
        taken: dict[str, int] = {}
        projections = []
        for p in layer.projections:
            parts = sources[p.parameter_name]
            number = taken[p.parameter_name] = taken.get(p.parameter_name, -1) + 1
            fields = fields_of(p)
            if len(parts) == 1:
                entry = parts[0] if p.expert is None else parts[0].part(p.expert)
            else:  # each view has a file's tensor of its own
                entry = parts[number]
                empty = nn.Parameter(torch.empty(entry.shape, device="meta"))
                fields |= {"parameter": empty, "rows": None}
            projections.append(StoredProjection(**fields, store=store, entry=entry))
        layers.append(replace(layer, projections=tuple(projections)))
    return replace(bare, layers=tuple(layers))
