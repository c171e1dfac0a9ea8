"""Prune a checkpoint without ever loading the model: matrix by matrix, or layer by layer where inputs are looked at.

Weights are read from the source's safetensors files and written to the same places of new ones; everything else
is copied bit for bit. Scores, thresholds and masks are made by `pruning`, so the result is the one in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
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
    Source,
    State,
    forget,
    identity_at,
    say,
    silent,
    size_of,
)
from causalprune.models import (
    Entry,
    Stored,
    auto_dtype,
    dtype_in_memory,
    fingerprint_of,
    open_checkpoint,
    raw_bytes,
    skeleton,
    warn_left_over,
)
from causalprune.pruning import (
    SENSITIVE,
    TRAINS,
    Factors,
    Gathered,
    Method,
    Plan,
    Pruned,
    Steps,
    carry_out,
    head_factors,
    manifest,
    planned,
    prune_layers,
    unrouted,
)
from causalprune.streaming.copies import COPIES, TURNS, Copies, check_unshared
from causalprune.streaming.residence import HERE, HiddenStates, Leave, Pair, Residence
from causalprune.streaming.spectra import Spectra
from causalprune.streaming.stored import Sources, Store, StoredProjection, find_sources, untie, with_stored

STREAMED = "streamed"
"""What the identity of what such a run keeps begins with."""


@dataclass(frozen=True)
class Streamed:
    """What a streaming run achieved."""

    weights: int
    zeros: int
    unrouted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What methods may look at: calibration data, tokens in a pass, GiB of hidden states in memory, effects of heads.

    The layer at work is on the `device`.
    """

    calibration: Calibration | None = None
    max_batch_tokens: int = 2048
    cache_gib: float = 1.0
    effects: Effects | None = None
    device: torch.device = HERE


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
    weights run the model with one layer in memory, on the data in `seen`; there it begins anew with the layers. What takes
    long is kept in `<output>.pruning`: a stopped run goes on from there.

    Raises:
        OptionError: the method needs the whole model, or effects or calibration data that are not given.
        CheckpointError: a file is damaged, or the output cannot be written; nothing is left behind.
        MismatchError: the effects were measured on another model, or what is kept is of another run.
    """
    checkpoints.check_destination(output, overwrite)
    seen = seen or Seen()
    effects, calibration = seen.effects, seen.calibration if method.walks else None
    kept_in = output.with_name(f"{output.name}.pruning")
    check_streams(method, data=seen.calibration is not None)
    stored = open_checkpoint(source)
    size = stored.size
    with closing(Store(size if calibration else 2 * size, on_progress)) as store:
        say(on_progress, part="1 of 2: checking files" if calibration else "")
        decoder, sources, spectra = _checked(source, stored, store, method, effects)
        factors, state = spectra.factors, _state(kept_in, decoder.fingerprint, method, seen)
        with checkpoints.complete(output, overwrite) as folder, ExitStack() as stack:
            copies = copies_of(method)
            _check_room(folder, decoder, size, kept_in, copies, _hidden_bytes(decoder, method, seen))
            if calibration is not None:
                reading = _residence(source, sources, stored, seen.device, head=method.takes_long)
                residence = stack.enter_context(reading)
                hidden_states = HiddenStates(seen.cache_gib * 2**30, folder, seen.device)
                hidden = stack.enter_context(closing(hidden_states))
                there = {name: factor.to(seen.device) for name, factor in factors.items()}
                plan = planned(residence.decoder, method, there, calibration, seen.max_batch_tokens)
                plan = replace(plan, hold=hidden.keep, state=state if _kept(method) else State())
                store.on_progress = silent
                pruned, missed = _one_by_one(plan, residence, seen, on_progress)
                pruned = residence.through(pruned, _leave(residence, store))
            else:
                plan, missed = planned(decoder, method, factors), tuple
                pruned = prune_layers(plan, Gathered(), Steps(), fixed=spectra.keeps(decoder))
            rows = _write(pruned, _pool(decoder), store, stored, folder)
            if factors and effects is not None:
                checkpoints.save_effects(effects, folder / checkpoints.EFFECTS)
            checkpoints.carry(decoder, folder)
            record = manifest(Pruned(method, Masks(), missed()), calibration, effects)
            sizes = dict.fromkeys(("before", "after"), asdict(size_of(decoder)))
            checkpoints.write_manifest(folder, decoder, {**record, "size": sizes, "streamed": True}, rows)
    if state.path is not None:  # else what is there now is another run's
        forget(kept_in)
    weights, zeros = (sum(row[key] for row in rows) for key in ("weights", "zeros"))
    return Streamed(weights, zeros, missed())


def _checked(
    source: Path, stored: Stored, store: Store, method: Method, effects: Effects | None
) -> tuple[Decoder, Sources, Spectra]:
    """Read everything once, and return the decoder with its fingerprint, where its values are, and what was counted."""
    decoder, sources = _opened(source, stored, store)
    checkpoints.warn_unpacked(decoder)
    factors: Factors = head_factors(decoder, effects, found=None) if "effects" in method.needs else {}
    spectra = Spectra(method, factors)
    found = _survey(decoder, sources, auto_dtype(source, stored), spectra)
    if factors and effects is not None and effects.model_fingerprint != found:
        raise MismatchError(f"the effects were measured on another model or revision than {source}")
    return replace(decoder, fingerprint=found), sources, spectra


def _kept(method: Method) -> bool:
    """Tell whether what is finished is kept of a stopped run: layers that were fitted too, which take long from files."""
    return method.takes_long or method.resolved_update == "refit"


def copies_of(method: Method) -> int:
    """Return how many copies of the prunable weights are on disk on the way, at most."""
    return COPIES if method.resolved_update in TRAINS else int(_kept(method))


def _state(path: Path, fingerprint: str, method: Method, seen: Seen) -> State:
    """Return what a stopped run has kept, and what keeps what takes long; what is there of another run is refused."""
    if not _kept(method) and not path.exists():
        return State()
    data, effects = (
        seen.calibration and seen.calibration.fingerprint,
        seen.effects and seen.effects.fingerprint,
    )
    identity = [STREAMED, fingerprint, asdict(method), data, effects, seen.max_batch_tokens]
    return State(path, identity, needed=True)


def _one_by_one(
    plan: Plan, residence: Residence, seen: Seen, on_progress: Progress
) -> tuple[Iterator[Pair], Callable[[], tuple[str, ...]]]:
    """Return what prunes layers that are in memory one at a time, and what tells in the end which matrices no token reached.

    What takes long is done on return, and its weights are in the plan's state.
    """
    steps = Steps(plan.costs, on_progress)
    if not _kept(plan.method):
        say(on_progress, part="2 of 2: layers")
        gathered = Gathered()
        return prune_layers(plan, gathered, steps), lambda: unrouted(plan, gathered)
    if plan.method.resolved_update in TRAINS:
        check_unshared(plan.decoder)
    copies = Copies(plan.state, residence)
    done, trained = carry_out(plan, steps, seen.calibration, seen.max_batch_tokens, copies.around)
    copies.settle(trained)
    say(on_progress, part="writing")
    return residence.one_by_one(done.keep), lambda: done.unrouted


def was_streamed(kept_in: Path) -> bool | None:
    """Tell whether a stopped run, of which something is kept in a folder, went from file to file; None where nothing is."""
    known = identity_at(kept_in)
    return None if known is None else known[0] == STREAMED


def check_streams(method: Method, *, data: bool = True, effects: bool = True) -> None:
    """Raise `OptionError` for a method that has to see all layers at once, or lacks calibration data or effects."""
    if "effects" in method.needs and not effects:
        raise OptionError(
            f"method {method.criterion!r} from files needs effects that were measured before: `causalprune attribute`, then --effects"
        )
    if not method.walks:
        return
    scope, update, budgets = method.resolved_scope, method.resolved_update, method.resolved_budgets
    if scope == "global" or budgets == "graded" or method.needs & SENSITIVE:
        raise OptionError(
            f"{method.criterion!r} with scope {scope}, update {update} and {budgets} budgets needs the whole "
            "model in memory: leave out --stream, or take another method"
        )
    if update == "adam":
        raise OptionError(
            "update adam remembers eight bytes of every weight, and --stream has one layer in memory: take +distill, which "
            "remembers next to nothing, or leave out --stream"
        )
    if not data:
        raise OptionError(f"method {method.criterion!r} needs calibration data")


def _write(
    pruned: Iterator[tuple[Projection, Tensor]],
    pool: Sequence["StoredProjection"],
    store: Store,
    stored: Stored,
    folder: Path,
) -> list[dict[str, Any]]:
    """Write all tensors to their places in new files, and the masks; return the counts of zeros.

    What was written of whole matrices of the first and of the last layer is read back.
    """
    rows, samples = [], dict[str, Tensor]()
    entries, by_name = stored.entries, {p.name: p.entry for p in pool}
    store.follow(p.entry for p in pool)
    with ExitStack() as stack:
        store.writers = stack.enter_context(stored.writers(folder))
        stack.callback(store.settle)
        shapes = {p.name: p.shape for p in pool}
        write_keep = stack.enter_context(checkpoints.keep_writer(folder / checkpoints.KEEP, shapes))
        for p, keep in pruned:
            rows.append(checkpoints.count(p))
            write_keep(p.name, keep)
            entry = by_name[p.name]
            if p.layer in (0, pool[-1].layer) and entry == entries[entry.name]:
                same = p.stored().shape == entry.shape  # else fused in memory, and apart in files
                samples[entry.name] = (p.stored() if same else p.read()).clone()
        store.flush()
        touched = {p.entry.name for p in pool}
        for entry in entries.values():
            if entry.name not in touched:
                store.copy(entry)
    checkpoints.check_written(folder, stored, samples.items())
    return rows


def stored_fingerprint(source: Path, on_progress: Progress = silent) -> str:
    """Return the fingerprint that the model in a local folder has when it is loaded, reading its files once."""
    stored = open_checkpoint(source)
    with closing(Store(stored.size, on_progress)) as store:
        decoder, sources = _opened(source, stored, store)
        return _survey(decoder, sources, auto_dtype(source, stored), Spectra(Method("magnitude", 0.5), {}))


def _opened(source: Path, stored: Stored, store: Store) -> tuple[Decoder, Sources]:
    warn_left_over(source)
    bare = replace(skeleton(source), source=Source(source, stored.dtype, stored.form))
    untie(bare, stored.entries)
    sources = find_sources(bare, stored.entries)
    return with_stored(bare, sources, store), sources


@contextmanager
def _residence(
    source: Path, sources: Sources, stored: Stored, device: torch.device, *, head: bool
) -> Iterator[Residence]:
    """Let the model run with a layer at a time on a device."""
    dtype = auto_dtype(source, stored)
    bare = skeleton(source, dtype=dtype)
    untie(bare, stored.entries)
    for p in bare.projections:
        for entry in sources[p.parameter_name]:
            if entry.dtype != dtype:
                raise CheckpointError(
                    f"{entry.name} is {entry.dtype} in the file, and the model is {dtype}: prune it in memory, "
                    "without --stream"
                )

    residence = Residence(bare, sources, dtype, device)
    with residence.open(stored.entries, head=head):
        yield residence


def _leave(residence: Residence, store: Store) -> Leave:
    """Return what writes the weights of a layer that goes to their places."""

    def leave(layer: Layer) -> None:
        for entry, data in residence.pieces(layer):
            store.writers[entry.file].write(entry.place, data)
            store.report(entry)

    return leave


def _survey(decoder: Decoder, sources: Sources, dtype: torch.dtype, spectra: Spectra) -> str:
    """Read everything once: check it, count it, and return the fingerprint that the loaded model would have."""
    pool: dict[Entry, list[StoredProjection]] = {}
    for p in _pool(decoder):
        pool.setdefault(p.entry, []).append(p)

    def count(own: Sequence[Projection]) -> None:
        for p in own:
            spectra.add(p)

    def pieces(name: str, wanted: torch.dtype) -> Iterator[Any]:
        for entry in _regions(sources[name], pool):
            if entry in pool:
                own = pool[entry]
                matrix = own[0].stored()
                counted = workers.submit(count, own)  # while the caller hashes
                yield raw_bytes(matrix.to(wanted))
                counted.result()
            elif entry.dtype == wanted:
                yield from (piece for _, piece in entry.chunks())
            else:
                yield raw_bytes(entry.read().to(wanted))

    names = sorted(sources)
    _pool(decoder)[0].store.follow(e for name in names for e in _regions(sources[name], pool) if e in pool)
    with ThreadPoolExecutor(1) as workers:
        wanted = {name: dtype_in_memory(decoder.model, name, dtype) for name in names}
        return fingerprint_of(decoder.model, ((name, own, pieces(name, own)) for name, own in wanted.items()))


def _pool(decoder: Decoder) -> list[StoredProjection]:
    return [p for p in decoder.projections if isinstance(p, StoredProjection)]


def _regions(entries: Sequence[Entry], pool: Mapping[Entry, Any]) -> Iterator[Entry]:
    """Yield entries, and the matrices of those that are stacks."""
    for entry in entries:
        if len(entry.shape) == 3 and entry.part(0) in pool:
            yield from (entry.part(i) for i in range(entry.shape[0]))
        else:
            yield entry


def _check_room(folder: Path, decoder: Decoder, size: int, kept_in: Path, copies: int, hidden: float) -> None:
    """Raise `CheckpointError` where a disk has no room for the checkpoint, its masks, copies of its prunable weights and `hidden` states.

    What copies a stopped run has `kept_in` its folder is there already.
    """
    pool = decoder.projections
    kept = kept_in.glob("*") if kept_in.is_dir() else ()
    there = sum(path.stat().st_size for path in kept if path.name.startswith(("layer-", *TURNS)))
    more = max(copies * sum(p.size * p.parameter.element_size() for p in pool) - there, 0)
    checkpoints.check_room(folder, size + sum(p.size for p in pool) // 8 + more + hidden)


def _hidden_bytes(decoder: Decoder, method: Method, seen: Seen) -> float:
    """Return what hidden states of the calibration data take on disk, at most: those of all layers where gradients go back."""
    if seen.calibration is None or not method.walks:
        return 0.0
    config = decoder.model.config.get_text_config(decoder=True)
    tokens = sum(len(example.tokens) for example in seen.calibration.examples)
    layers = len(decoder.layers) + 4 if "slopes" in method.needs else 4
    each = tokens * config.hidden_size * decoder.projections[0].parameter.element_size()
    return max(float(layers * each) - seen.cache_gib * 2**30, 0.0)
