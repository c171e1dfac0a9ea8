"""Prune a checkpoint without ever loading the model: matrix by matrix, or layer by layer where inputs are looked at.

Weights are read from the source's safetensors files and written to the same places of new ones; everything else
is copied bit for bit. Scores, thresholds and masks are made by `pruning`, so the result is the one in memory.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalprune import checkpoints
from causalprune.core import (
    Calibration,
    CheckpointError,
    Decoder,
    Effects,
    Layer,
    Masks,
    MismatchError,
    OptionError,
    Progress,
    Projection,
    packed,
    say,
    silent,
)
from causalprune.models import (
    INDEX,
    Entry,
    ShardWriter,
    auto_dtype,
    fingerprint_of,
    inside,
    layout,
    open_checkpoint,
    raw_bytes,
    skeleton,
)
from causalprune.pruning import (
    Factors,
    Gathered,
    Method,
    Pruned,
    Steps,
    head_factors,
    manifest,
    planned,
    prune_layers,
    unrouted,
)
from causalprune.streaming.residence import HiddenStates, Residence
from causalprune.streaming.spectra import Spectra
from causalprune.streaming.stored import Sources, Store, StoredProjection, find_sources, with_stored

LEFT_BEHIND = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx"}


@dataclass(frozen=True)
class Streamed:
    """What a streaming run achieved."""

    weights: int
    zeros: int
    unrouted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What methods may look at: calibration data, tokens in a pass, GiB of hidden states in memory, effects of heads."""

    calibration: Calibration | None = None
    max_batch_tokens: int = 2048
    cache_gib: float = 1.0
    effects: Effects | None = None


def prune_stream(
    source: Path,
    output: Path,
    method: Method,
    *,
    seen: Seen | None = None,
    overwrite: bool = False,
    on_progress: Progress = silent,
) -> Streamed:
    """Prune the checkpoint in folder `source` into the new folder `output`, side files as by `checkpoint.save`.

    The source is read twice and the copy written once; float32 weights under scope `global` are read four times.
    All files are checked before anything is written. Progress counts bytes. Methods that look at inputs or update
    weights run the model with one layer in memory, on the data in `seen`; there it begins anew with the layers.

    Raises:
        OptionError: the method needs the whole model, or effects or calibration data that are not given.
        CheckpointError: a file is damaged, or the output cannot be written; nothing is left behind.
        MismatchError: the effects were measured on another model.
    """
    checkpoints.check_destination(output, overwrite)
    seen = seen or Seen()
    effects, calibration = seen.effects, seen.calibration if method.walks else None
    check_streams(method, data=seen.calibration is not None)
    files, entries = open_checkpoint(source)
    size = sum(e.stop - e.start for e in entries.values())
    with closing(Store(size if calibration else 2 * size, on_progress)) as store:
        say(on_progress, part="1 of 2: checking files" if calibration else "")
        decoder, sources = _opened(source, entries, store)
        factors: Factors = {}
        if "effects" in method.needs:
            factors = head_factors(decoder, effects, found=None)
        spectra = Spectra(method, factors)
        found = _survey(decoder, sources, _dtype(source, entries), spectra)
        if factors and effects is not None and effects.model_fingerprint != found:
            raise MismatchError(f"the effects were measured on another model or revision than {source}")
        decoder = replace(decoder, fingerprint=found)
        with checkpoints.complete(output, overwrite) as folder, ExitStack() as stack:
            _check_room(folder, files, decoder)
            gathered = Gathered()
            if calibration is not None:
                residence = stack.enter_context(_residence(source, sources, entries, store))
                hidden = stack.enter_context(closing(HiddenStates(seen.cache_gib * 2**30, folder)))
                plan = planned(residence.decoder, method, factors, calibration, seen.max_batch_tokens)
                plan, store.on_progress = replace(plan, hold=hidden.keep), silent
                say(on_progress, part="2 of 2: layers")
                pruned = residence.through(prune_layers(plan, gathered, Steps(plan.costs, on_progress)))
            else:
                plan = planned(decoder, method, factors)
                pruned = prune_layers(plan, gathered, Steps(), fixed=spectra.keeps(decoder))
            targets = {file: folder / file.name for file in files}
            rows = _write(pruned, _pool(decoder), store, entries, targets)
            if factors and effects is not None:
                checkpoints.save_effects(effects, folder / checkpoints.EFFECTS)
            _copy_rest(source, folder)
            record = manifest(Pruned(method, Masks(), unrouted(plan, gathered)), calibration, effects)
            record["streamed"] = True
            checkpoints.write_manifest(folder, decoder, record, rows)
    weights, zeros = (sum(row[key] for row in rows) for key in ("weights", "zeros"))
    return Streamed(weights, zeros, unrouted(plan, gathered))


def check_streams(method: Method, *, data: bool = True) -> None:
    """Raise `OptionError` for a method that has to see all layers at once, or lacks calibration data."""
    if not method.walks:
        return
    scope, update, budgets = method.resolved_scope, method.resolved_update, method.resolved_budgets
    if "slopes" in method.needs or scope == "global" or update == "distill" or budgets == "graded":
        raise OptionError(
            f"{method.criterion!r} with scope {scope}, update {update} and {budgets} budgets needs the whole "
            "model in memory: leave out --stream, or take another method"
        )
    if not data:
        raise OptionError(f"method {method.criterion!r} needs calibration data")


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
        keep_file = next(iter(targets.values())).with_name(checkpoints.KEEP)
        write_keep = stack.enter_context(keep_writer(keep_file, pool))
        for p, keep in pruned:
            rows.append(checkpoints.count(p))
            write_keep(p.name, keep)
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
    sources = find_sources(bare, entries)
    return with_stored(bare, sources, store), sources


@contextmanager
def _residence(
    source: Path, sources: Sources, entries: Mapping[str, Entry], store: Store
) -> Iterator[Residence]:
    """Let the model run with a layer at a time in memory, whose weights are written to their places when it goes."""
    dtype = _dtype(source, entries)
    bare = skeleton(source, dtype=dtype)
    for p in bare.projections:
        for entry in sources[p.parameter_name]:
            if entry.dtype != dtype:
                raise CheckpointError(
                    f"{entry.name} is {entry.dtype} in the file, and the model is {dtype}: prune it in memory, "
                    "without --stream"
                )

    def leave(layer: Layer) -> None:
        for entry, data in residence.pieces(layer):
            store.writers[entry.file].write(entry.start, data)
            store.report(entry)

    residence = Residence(bare, sources, dtype, leave)
    with residence.open(entries):
        yield residence


@contextmanager
def keep_writer(path: Path, projections: Sequence[Projection]) -> Iterator[Callable[[str, Tensor], None]]:
    """Hand out what writes `keep_masks.safetensors` mask by mask, given a projection's name and what stays of it."""
    sizes = {p.name: (p.size + 7) // 8 for p in projections}
    metadata = {p.name: f"{p.shape[0]},{p.shape[1]}" for p in projections}
    header, places, size = layout(sizes, metadata)
    with closing(ShardWriter(path, header, size)) as file:
        yield lambda name, keep: file.write(places[name], packed(keep))


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
    ours = {checkpoints.MANIFEST, checkpoints.KEEP, checkpoints.EFFECTS, "README.md"}
    names = [p.name for p in source.iterdir() if p.is_file() and p.suffix not in LEFT_BEHIND]
    names = [name for name in names if name not in ours and not name.startswith(".")]
    for name in sorted(names, key=lambda name: name == INDEX):
        if not name.endswith((".bin.index.json",)):
            shutil.copyfile(inside(source, name), folder / name)
