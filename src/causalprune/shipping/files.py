"""GGUF files: read with every fault in one line, quantised tensor by tensor, and their zeros counted."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from causalprune.core import CheckpointError, ModelError, OptionError, Progress, say, silent
from causalprune.shipping.converting import needed
from causalprune.shipping.mixtures import MIXES, Shape, need_importance, types_of

Importance = Mapping[str, Float[ndarray, "expert in"]]
"""By tensor of a GGUF file, the mean square of what enters every column, of one expert or of each."""

ZEROS, TENSORS = "causalprune.zeros", "causalprune.tensors"
"""What files of ours say of themselves: which matrices had how many zeros before they were quantised."""
_OURS = ("general.architecture", "general.file_type", "general.quantization_version", ZEROS, TENSORS)
LAYERS = "blk."
"""How names of what is in a layer begin."""
_ROWS = 2**22
"""Weights that are read at once."""


@dataclass(frozen=True)
class Held:
    """A matrix in a file: its shape with rows last, its type and bytes, how many weights are zero, and of those how many were before."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    zeros: int | None = None
    kept: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))


def opened(path: Path) -> Any:
    """Return a reader of a GGUF file; weights stay on the disk.

    Raises:
        ModelError: it is none, a part of one, it is cut, or its tensors disagree with its metadata.
    """
    needed("gguf")
    from gguf import GGUFReader  # noqa: PLC0415  an extra

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError(f"{str(path)!r} is no GGUF file: it begins with {magic!r}")
    try:
        reader = GGUFReader(path)
        parts = int(field(reader, "split.count") or 1)
        last = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
        whole = last <= path.stat().st_size and field(reader, "general.architecture")
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
        UnicodeDecodeError,
    ) as error:
        raise ModelError(f"{str(path)!r} is cut or damaged: its header cannot be read ({error})") from error
    if parts > 1:
        raise ModelError(
            f"{str(path)!r} is one of {parts} parts of a split GGUF file: join them first, with "
            "`llama-gguf-split --merge FIRST-PART WHOLE.gguf`"
        )
    if not whole:
        raise ModelError(
            f"{str(path)!r} is cut: its tensors end after byte {last:,}, where the file has no more"
        )
    _check_agreement(path, reader)
    return reader


def _check_agreement(path: Path, reader: Any) -> None:
    """Raise `ModelError` where tensors are not what the metadata say."""
    own = str(field(reader, "general.architecture"))
    sizes = {t.name: shape_of(t) for t in reader.tensors}
    layers = {name.split(".")[1] for name in sizes if name.startswith(LAYERS)}
    said = field(reader, f"{own}.block_count")
    if said is not None and len(layers) != said:
        raise ModelError(
            f"{str(path)!r} says {own}.block_count = {said}, and has tensors of {len(layers)} layers"
        )
    if (embedding := sizes.get("token_embd.weight")) is None:
        raise ModelError(f"{str(path)!r} has no token_embd.weight: it is no language model")
    width, tokens = (
        field(reader, f"{own}.embedding_length"),
        field(reader, "tokenizer.ggml.tokens", length=True),
    )
    inner, down = field(reader, f"{own}.feed_forward_length"), sizes.get(f"{LAYERS}0.ffn_down.weight")
    pairs = [("embedding_length", embedding[-1], width, "token_embd.weight")]
    pairs += [("tokens", embedding[0], tokens, "token_embd.weight")]
    if down is not None and isinstance(inner, int):
        pairs += [("feed_forward_length", down[-1], inner, f"{LAYERS}0.ffn_down.weight")]
    for what, found, wanted, tensor in pairs:
        if wanted is not None and found != wanted:
            raise ModelError(f"{str(path)!r} says {what} = {wanted}, and its {tensor} has {found}")


def field(reader: Any, key: str, *, length: bool = False) -> Any:
    """Return what a file says under a key, or of how many values it consists; None where it says nothing."""
    found = reader.fields.get(key)
    return None if found is None else len(found.data) if length else found.contents()


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, rows last."""
    return tuple(int(n) for n in reversed(tensor.shape))


def read_rows(tensor: Any) -> Iterator[Float[ndarray, "row in"]]:
    """Yield the weights of a tensor as they come out of its type, some rows at a time."""
    from gguf.quants import dequantize  # noqa: PLC0415  an extra

    width = shape_of(tensor)[-1]
    stored = tensor.data.reshape(-1, tensor.data.shape[-1])
    step = max(1, _ROWS // width)
    try:
        for start in range(0, len(stored), step):
            yield dequantize(stored[start : start + step], tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise ModelError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read back"
        ) from error


def counted(reader: Any, progress: Progress = silent) -> list[Held]:
    """Return the matrices of a file, and how many of their weights come out as zero."""
    matrices = [t for t in reader.tensors if len(t.shape) > 1]
    total, done, found = sum(int(t.n_elements) for t in matrices), 0, []
    say(progress, unit="weights")
    for tensor in matrices:
        zeros = sum(int((rows == 0).sum()) for rows in read_rows(tensor))
        found.append(Held(tensor.name, tensor.tensor_type.name, shape_of(tensor), int(tensor.n_bytes), zeros))
        progress(done := done + found[-1].weights, total)
    return found


def planned(reader: Any, mix: str, *, weighted: bool) -> dict[str, str]:
    """Return the type that every tensor of a file gets in a mix.

    Raises:
        OptionError: the mix needs an importance matrix, and there is none.
        ModelError: a matrix has rows that the mix cannot hold.
    """
    own = str(field(reader, "general.architecture"))
    heads, groups = (_first(field(reader, f"{own}.attention.head_count{kv}")) for kv in ("", "_kv"))
    shape = Shape(
        own,
        int(field(reader, f"{own}.block_count") or 0),
        heads // groups if groups else 0,
        int(field(reader, f"{own}.expert_count") or 0),
        weighted,
    )
    types = types_of({t.name: shape_of(t) for t in reader.tensors}, mix, shape)
    if not weighted and (needing := list(need_importance(types, mix))):
        raise OptionError(
            f"{mix} stores {len(needing)} matrices ({needing[0]}, …) in types that are of no use without an importance "
            "matrix: name what calibrates it, as -t gsm8k:64"
        )
    return {t.name: types[t.name] or t.tensor_type.name for t in reader.tensors}


def file_bytes(reader: Any, types: Mapping[str, str], *, layers: bool = True) -> int:
    """Return the size of a file with these types, with tensors of its layers or without.

    It is what is before its tensors, to which our own record is added, and these.
    """
    from gguf import GGMLQuantizationType as Types  # noqa: PLC0415  an extra

    align = reader.alignment
    own = [t for t in reader.tensors if layers or not t.name.startswith(LAYERS)]
    sizes = [_size(Types[types[t.name]], shape_of(t)) for t in own]
    record = sum(len(t.name) + 12 for t in reader.tensors if len(t.shape) > 1) + 100
    head = min(int(t.data_offset) for t in reader.tensors) + record
    return sum(-(-size // align) * align for size in (head, *sizes))


def _first(value: Any) -> int:
    """Return a number that may be there for every layer."""
    return int(next(iter(value), 0) if isinstance(value, list) else value or 0)


@dataclass(frozen=True)
class Written:
    """A file that was written: its matrices, with the zeros in it, and how many there were before it was quantised."""

    file: Path
    mix: str
    bytes: int
    matrices: tuple[Held, ...]
    zeros_before: int

    @property
    def zeros(self) -> int:
        """Weights that are zero in the file."""
        return sum(own.zeros or 0 for own in self.matrices)

    @property
    def kept(self) -> int:
        """Weights that are zero in the file and were before."""
        return sum(own.kept or 0 for own in self.matrices)


def quantise(
    source: Path, target: Path, mix: str, importance: Importance | None = None, progress: Progress = silent
) -> Written:
    """Write a GGUF file of unquantised weights again in the types of a mix, tensor by tensor; nothing is left of a failed one."""
    from gguf import GGUFValueType, GGUFWriter  # noqa: PLC0415  an extra

    reader = opened(source)
    types = planned(reader, mix, weighted=importance is not None)
    before = {own.name: own.zeros or 0 for own in counted(reader)}
    with complete_file(target) as temporary:
        writer = GGUFWriter(temporary, field(reader, "general.architecture"))
        copy_fields(reader, writer)
        writer.add_file_type(MIXES[mix][1])
        writer.add_quantization_version(2)
        writer.add_array(TENSORS, [*before])
        writer.add_key_value(ZEROS, [*before.values()], GGUFValueType.ARRAY, GGUFValueType.INT64)
        try:
            made = _write_tensors(reader, writer, types, importance or {}, progress)
        finally:
            writer.close()
    return Written(target, mix, target.stat().st_size, tuple(made), sum(before.values()))


def copy_fields(
    reader: Any, writer: Any, without: Collection[str] = (), renamed: Mapping[str, str] = {}
) -> None:
    """Copy what a file says, but for what is said anew; beginnings of keys may be `renamed`."""
    for own in reader.fields.values():
        if own.name in (*_OURS, *without) or own.name.startswith("GGUF."):
            continue
        begin = next((old for old in renamed if own.name.startswith(old)), "")
        name, kind = renamed.get(begin, "") + own.name.removeprefix(begin), own.types[0]
        writer.add_key_value(name, own.contents(), kind, own.types[-1] if len(own.types) > 1 else None)


def _write_tensors(
    reader: Any, writer: Any, types: Mapping[str, str], importance: Importance, progress: Progress
) -> list[Held]:
    """Write all tensors in their types, and return the matrices among them with their zeros."""
    from gguf import GGMLQuantizationType as Types  # noqa: PLC0415  an extra

    for tensor in reader.tensors:
        kind, shape = Types[types[tensor.name]], shape_of(tensor)
        stored = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
        size = _size(kind, shape)
        wide = shape if stored != np.uint8 else (*shape[:-1], size // int(np.prod(shape[:-1])))
        writer.add_tensor_info(tensor.name, wide, stored, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    made, total, done = list[Held](), sum(int(t.n_elements) for t in reader.tensors), 0
    say(progress, unit="weights")
    for tensor in reader.tensors:
        own, shape = types[tensor.name], shape_of(tensor)
        weights = np.concatenate([*read_rows(tensor)]).reshape(shape)
        data = encoded(weights, own, importance.get(tensor.name))
        writer.write_tensor_data(data)
        if len(shape) > 1:
            zero = decoded(data, own).reshape(shape) == 0
            kept = int(zero[weights == 0].sum())
            made.append(Held(tensor.name, own, shape, data.nbytes, int(zero.sum()), kept))
        progress(done := done + weights.size, total)
    return made


def _size(kind: Any, shape: Sequence[int]) -> int:
    from gguf import GGML_QUANT_SIZES  # noqa: PLC0415  an extra

    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encoded(
    weights: Float[ndarray, "*rows in"], kind: str, importance: Float[ndarray, "expert in"] | None = None
) -> Any:
    """Return weights in a type of GGML, as llama.cpp computes it: bit for bit its `ggml_quantize_chunk`."""
    import libgguf  # noqa: PLC0415  an extra

    own = libgguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        return weights.astype(np.float32 if kind == "F32" else np.float16)
    if importance is None or kind == "BF16":
        return libgguf.quantize_rows(weights, own)
    experts = weights.reshape(len(importance), -1, weights.shape[-1])
    parts = [libgguf.quantize_rows(w, own, i) for w, i in zip(experts, importance, strict=True)]
    return np.stack(parts).reshape(*weights.shape[:-1], -1)


def decoded(data: Any, kind: str) -> Float[ndarray, "*rows in"]:
    """Return the weights that come out of a type of GGML."""
    import libgguf  # noqa: PLC0415  an extra

    own = libgguf.GGMLQuantizationType[kind]
    block, size = libgguf.GGML_QUANT_SIZES[own]
    if kind in ("F32", "F16"):
        found = data.astype(np.float32)
    elif kind == "BF16":
        found = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        found = libgguf.dequantize_rows(data, own, n_per_row=data.shape[-1] // size * block)
    return np.asarray(found)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Hand out a path beside a file that takes its name once all is written, and is gone where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
