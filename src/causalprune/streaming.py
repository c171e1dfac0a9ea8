"""Prune a checkpoint matrix by matrix, without ever building the model: memory for the largest matrix, and a little.

Weights are read from the source's safetensors files and written to the same places of new ones; everything else
is copied bit for bit. Scores, thresholds and masks are made by `pruning`, so the result is the one in memory.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune import checkpoint
from causalprune.anatomy import expert_weight, fingerprint_of, raw_bytes
from causalprune.criteria import CRITERIA
from causalprune.errors import CheckpointError, MismatchError
from causalprune.methods import Method
from causalprune.model import auto_dtype, skeleton
from causalprune.pruning import Factors, Pruned, head_factors, manifest, prune_by_value
from causalprune.shards import INDEX, Entry, ShardWriter, inside, layout, open_checkpoint
from causalprune.spectra import Spectra
from causalprune.types import Decoder, Effects, Layer, Progress, Projection, silent

LEFT_BEHIND = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx"}
Sources = Mapping[str, Sequence[Entry]]  # where the values of each parameter of the model are, in their order


@dataclass(frozen=True)
class Streamed:
    """What a streaming run achieved."""

    weights: int
    zeros: int


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
        self._done, self._total, self._on_progress = 0, total, on_progress

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
            self._going = self._writer.submit(write, self._at.start, raw_bytes(self._matrix))
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
        self._done += entry.stop - entry.start
        self._on_progress(min(self._done, self._total), self._total)


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

    @property
    def device(self) -> torch.device:
        """Where `read` gives the matrix."""
        return torch.device("cpu")


def prune_stream(
    source: Path,
    output: Path,
    method: Method,
    *,
    effects: Effects | None = None,
    overwrite: bool = False,
    on_progress: Progress = silent,
) -> Streamed:
    """Prune the checkpoint in folder `source` into the new folder `output`, side files as by `checkpoint.save`.

    The source is read twice and the copy written once; float32 weights under scope `global` are read four times.
    All files are checked before anything is written. Progress counts bytes.

    Raises:
        OptionError: the method looks at inputs or updates weights, or needs effects that are not given.
        CheckpointError: a file is damaged, or the output cannot be written; nothing is left behind.
        MismatchError: the effects were measured on another model.
    """
    checkpoint.check_destination(output, overwrite)
    files, entries = open_checkpoint(source)
    size = sum(e.stop - e.start for e in entries.values())
    with closing(Store(2 * size, on_progress)) as store:
        decoder, sources = _opened(source, entries, store)
        factors: Factors = {}
        if CRITERIA[method.criterion].needs == "effects":
            factors = head_factors(decoder, effects, found=None)
        spectra = Spectra(method, factors)
        found = _survey(decoder, sources, _dtype(source, entries), spectra)
        if factors and effects is not None and effects.model_fingerprint != found:
            raise MismatchError(f"the effects were measured on another model or revision than {source}")
        decoder = replace(decoder, fingerprint=found)
        pruned = prune_by_value(decoder, method, factors, fixed=spectra.keeps(decoder))
        with checkpoint.complete(output, overwrite) as folder:
            _check_room(folder, files, decoder)
            rows = _write(
                pruned, _pool(decoder), store, entries, {file: folder / file.name for file in files}
            )
            if factors and effects is not None:
                checkpoint.save_effects(effects, folder / checkpoint.EFFECTS)
            _copy_rest(source, folder)
            record = {**manifest(Pruned(method, {}, ()), None, effects), "streamed": True}
            checkpoint.write_manifest(folder, decoder, record, rows)
    return Streamed(sum(row["weights"] for row in rows), sum(row["zeros"] for row in rows))


def _write(
    pruned: Iterator[tuple[Projection, Tensor]],
    pool: Sequence["StoredProjection"],
    store: Store,
    entries: Mapping[str, Entry],
    targets: Mapping[Path, Path],
) -> list[dict[str, Any]]:
    """Write all tensors to their places in new files, and the masks; return the counts of zeros."""
    rows = []
    store.follow(p.entry for p in pool)
    with ExitStack() as stack:
        for source, target in targets.items():
            store.writers[source] = ShardWriter.like(source, target)
            stack.callback(store.writers[source].close)
        stack.callback(store.settle)
        keep_file = next(iter(targets.values())).with_name(checkpoint.KEEP)
        keeps = stack.enter_context(KeepWriter(keep_file, pool))
        for p, keep in pruned:
            rows.append(checkpoint.count(p))
            keeps.write(p.name, keep)
        store.flush()
        touched = {p.entry.name for p in pool}
        for entry in entries.values():
            if entry.name not in touched:
                store.copy(entry)
    return rows


def stored_fingerprint(source: Path, on_progress: Progress = silent) -> str:
    """Return the fingerprint that the model in a local folder has when it is loaded, reading its files once."""
    _, entries = open_checkpoint(source)
    with closing(Store(sum(e.stop - e.start for e in entries.values()), on_progress)) as store:
        decoder, sources = _opened(source, entries, store)
        return _survey(decoder, sources, _dtype(source, entries), Spectra(Method("magnitude", 0.5), {}))


def _opened(source: Path, entries: Mapping[str, Entry], store: Store) -> tuple[Decoder, Sources]:
    bare = skeleton(source)
    sources = _sources(bare, entries)
    return _with_stored(bare, sources, store), sources


class KeepWriter:
    """`keep_masks.safetensors`, written mask by mask."""

    def __init__(self, path: Path, projections: Sequence[Projection]) -> None:
        sizes = {p.name: (p.size + 7) // 8 for p in projections}
        metadata = {p.name: f"{p.shape[0]},{p.shape[1]}" for p in projections}
        header, self._places, size = layout(sizes, metadata)
        self._file = ShardWriter(path, header, size)

    def __enter__(self) -> "KeepWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, keep: Tensor) -> None:
        """Write what stays of a projection."""
        self._file.write(self._places[name], np.packbits(keep.numpy()))


def _survey(decoder: Decoder, sources: Sources, dtype: torch.dtype, spectra: Spectra) -> str:
    """Read everything once: check it, count it, and return the fingerprint that the loaded model would have."""
    pool: dict[Entry, list[StoredProjection]] = {}
    for p in _pool(decoder):
        pool.setdefault(p.entry, []).append(p)

    def count(own: Sequence[Projection]) -> None:
        for p in own:
            spectra.add(p)

    def pieces(name: str) -> Iterator[Any]:
        for entry in _regions(sources[name], pool):
            if entry in pool:
                own = pool[entry]
                matrix = own[0].stored()
                counted = workers.submit(count, own)  # while the caller hashes
                yield raw_bytes(matrix.to(dtype))
                counted.result()
            elif entry.dtype == dtype:
                yield from (piece for _, piece in entry.chunks())
            else:
                yield raw_bytes(entry.read().to(dtype))

    names = sorted(sources)
    _pool(decoder)[0].store.follow(e for name in names for e in _regions(sources[name], pool) if e in pool)
    with ThreadPoolExecutor(1) as workers:
        return fingerprint_of(decoder.model, ((name, dtype, pieces(name)) for name in names))


def _pool(decoder: Decoder) -> list[StoredProjection]:
    return [p for p in decoder.projections if isinstance(p, StoredProjection)]


def _regions(entries: Sequence[Entry], pool: Mapping[Entry, Any]) -> Iterator[Entry]:
    """Yield entries, and the matrices of those that are stacks."""
    for entry in entries:
        if len(entry.shape) == 3 and entry.part(0) in pool:
            yield from (entry.part(i) for i in range(entry.shape[0]))
        else:
            yield entry


def _sources(bare: Decoder, entries: Mapping[str, Entry]) -> Sources:
    """Find the values of every parameter: under its name, with or without the prefix of the base model, or in parts."""
    prefix = f"{bare.model.base_model_prefix}."
    found: dict[str, Sequence[Entry]] = {}
    for name, parameter in bare.model.named_parameters():
        names = [name, prefix + name, name.removeprefix(prefix)]
        exact = [entries[n] for n in names if n in entries and entries[n].shape == tuple(parameter.shape)]
        found[name] = exact[:1]
    taken = {entry.name for parts in found.values() for entry in parts}
    for name, parts in found.items():
        if parts:
            continue
        shape = tuple(bare.model.get_parameter(name).shape)
        left = {n: entry for n, entry in entries.items() if n not in taken}
        found[name] = _renamed(bare.layers, name, shape, left)
        if not found[name]:
            raise CheckpointError(
                f"{name} {list(shape)} is not in the checkpoint under a name that can be streamed: "
                "prune it in memory, without --stream"
            )
    return found


def _renamed(
    layers: Sequence[Layer], name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]
) -> list[Entry]:
    """Find a parameter under another name: in its layer, or as the only one of its shape outside all layers."""
    for layer in layers:
        if name.startswith(f"{layer.name}."):
            own = {n: entry for n, entry in entries.items() if n.startswith(f"{layer.name}.")}
            return _in_layer(layer, name, shape, own)
    outside = [e for n, e in entries.items() if not any(n.startswith(f"{layer.name}.") for layer in layers)]
    alike = [entry for entry in outside if entry.shape == shape]
    return alike if len(alike) == 1 else []


def _in_layer(layer: Layer, name: str, shape: tuple[int, ...], entries: Mapping[str, Entry]) -> list[Entry]:
    """Return the matrices that a stack of experts is saved as, or the one tensor that was only renamed."""
    views = [p for p in layer.projections if p.parameter_name == name]
    if views and views[0].expert is not None:
        paths = {expert_weight(n.removeprefix(f"{layer.name}.")): e for n, e in entries.items()}
        parts = [paths.get((p.expert or 0, p.role)) for p in views]
        plain = not any(p.transposed or (isinstance(p.rows, slice) and p.rows.step) for p in views)
        fit = [e for e, p in zip(parts, views, strict=True) if e is not None and e.shape == p.shape]
        return fit if plain and len(fit) == len(views) else []
    ending = name.split(".")[-2:]
    alike = [e for n, e in entries.items() if n.split(".")[-2:] == ending and e.shape == shape]
    return alike if len(alike) == 1 else []


def _with_stored(bare: Decoder, sources: Sources, store: Store) -> Decoder:
    """Return the decoder with projections that are read from files."""
    layers = []
    for layer in bare.layers:
        taken: dict[str, int] = {}
        projections = []
        for p in layer.projections:
            parts = sources[p.parameter_name]
            number = taken[p.parameter_name] = taken.get(p.parameter_name, -1) + 1
            fields = {name: getattr(p, name) for name in Projection.__dataclass_fields__}
            if len(parts) == 1:
                entry = parts[0] if p.expert is None else parts[0].part(p.expert)
            else:  # each view has a file's tensor of its own
                entry = parts[number]
                empty = nn.Parameter(torch.empty(entry.shape, device="meta"))
                fields |= {"parameter": empty, "rows": None}
            projections.append(StoredProjection(**fields, store=store, entry=entry))
        layers.append(replace(layer, projections=tuple(projections)))
    return replace(bare, layers=tuple(layers))


def _dtype(source: Path, entries: Mapping[str, Entry]) -> torch.dtype:
    """Return the dtype in which the model is loaded."""
    floating = (entry.dtype for entry in entries.values() if entry.dtype.is_floating_point)
    return auto_dtype(source, next(floating, torch.float32))


def _check_room(folder: Path, files: Sequence[Path], decoder: Decoder) -> None:
    needed = sum(file.stat().st_size for file in files) + sum(p.size for p in decoder.projections) // 8
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{needed / 1e9:.2f} GB are needed for {folder}, and {free / 1e9:.2f} GB are free there"
        )


def _copy_rest(source: Path, folder: Path) -> None:
    """Copy configuration and tokenizer, and last the index, which makes the weights a checkpoint."""
    ours = {checkpoint.MANIFEST, checkpoint.KEEP, checkpoint.EFFECTS, "README.md"}
    names = [p.name for p in source.iterdir() if p.is_file() and p.suffix not in LEFT_BEHIND]
    names = [name for name in names if name not in ours and not name.startswith(".")]
    for name in sorted(names, key=lambda name: name == INDEX):
        if not name.endswith((".bin.index.json",)):
            shutil.copyfile(inside(source, name), folder / name)
