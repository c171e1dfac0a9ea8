"""Which files of a folder are a model, the tensors in them, and the files that hold them when they are written again."""

import json
import math
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import file_exists, try_to_load_from_cache
from torch import Tensor
from transformers import AutoConfig

from causalprune.core import CheckpointError, ModelError, Source
from causalprune.models.packing import SUFFIXES, Form, packing, unpack_fp8, unpack_mxfp4
from causalprune.models.shards import Entry, Made, ShardWriter, inside, layout, read_header

INDEX, SUFFIX, PICKLE = "model.safetensors.index.json", ".safetensors", ".bin"
FORMS = (f"model{SUFFIX}", INDEX, f"pytorch_model{PICKLE}", f"pytorch_model{PICKLE}.index.json")
"""Files that make a folder a model, the first that is there: what transformers takes."""
WEIGHTS = {SUFFIX, PICKLE, ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx", ".ot", ".pkl", ".npz"}
"""Endings of files that hold weights, or what a trainer knows."""
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.gguf")
_EIGHT = {torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass(frozen=True)
class Shard:
    """A weight file, and its copy: what that is called, begins with, and how many bytes it has."""

    file: Path
    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class Stored:
    """The weights in a model folder, every header checked, and the files that hold them when they are written again.

    `form` is how they are packed: the tensors of `entries` are not. `index` is the text of their index, if there is one.
    """

    shards: tuple[Shard, ...]
    entries: Mapping[str, Entry]
    form: Form | None
    index: str | None

    @property
    def size(self) -> int:
        """Bytes of all tensors when they are written again."""
        return sum(entry.stop - entry.start for entry in self.entries.values())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most weights."""
        sizes: dict[torch.dtype, int] = {torch.float32: 0}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    @contextmanager
    def writers(self, folder: Path) -> "Iterator[dict[Path, ShardWriter]]":
        """Hand out what writes the copy of each file, and in the end write the index, which makes them a checkpoint."""
        with ExitStack() as stack:
            writers = {}
            for shard in self.shards:
                writers[shard.file] = ShardWriter(folder / shard.name, shard.header, shard.size)
                stack.callback(writers[shard.file].close)
            yield writers
        if self.index is not None:
            (folder / INDEX).write_text(self.index, encoding="utf-8")


def open_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16, *, pickles: bool = False) -> Stored:
    """Return the weights of a model folder, all headers checked; what is packed has the `dtype` when it is unpacked.

    Raises:
        CheckpointError: a file is missing, damaged, or lies elsewhere; the index does not fit; there are only pickles.
        ModelError: weights are packed in a form that is not known.
    """
    record = _config(folder).get("quantization_config")
    form, (files, index) = packing(record, str(folder)), weight_files(folder)
    if files[0].suffix == PICKLE and not pickles:
        raise CheckpointError(
            f"{folder}: {files[0].name} is a pickle, which can run code: convert it to safetensors"
        )
    found: dict[str, Entry] = {}
    for file in files:
        for entry in _unpickled(file) if file.suffix == PICKLE else read_header(file):
            if entry.name in found:
                raise CheckpointError(f"{entry.name} is both in {found[entry.name].file} and in {file}")
            found[entry.name] = entry
    for name, file_name in (_read_index(index) if index else {}).items():
        if name not in found or found[name].file.name != file_name:
            raise CheckpointError(
                f"{index} says that {name} is in {file_name}, and it is not: fetch both again"
            )
    made = dict(_unpacked(found, form, record, dtype))
    if form is None and files[0].suffix == SUFFIX:
        shards = [Shard(file, file.name, _header(file), file.stat().st_size) for file in files]
        return Stored(tuple(shards), made, form, index.read_text(encoding="utf-8") if index else None)
    return _again(files, made, form)


def weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """Return the files that hold a model, as transformers chooses them, and the index that names them, if one does.

    Raises:
        CheckpointError: there are none, one is missing, or lies elsewhere.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: streaming needs a local folder with safetensors files"
        )
    names = (_config(folder).get("transformers_weights"), *FORMS)
    name = next((name for name in names if name and (folder / name).is_file()), None)
    if name is None:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHTS)
        has = f"only {', '.join(others[:3])}" if others else "no weight files"
        raise CheckpointError(f"{folder} has no {FORMS[0]} and no {INDEX}, {has}: fetch it again")
    if not name.endswith(".json"):
        return [inside(folder, name)], None
    index = inside(folder, name)
    return [inside(folder, own) for own in sorted(set(_read_index(index).values()))], index


def warn_left_over(folder: Path) -> None:
    """Warn of weight files in a model folder beside those that transformers takes."""
    files, index = weight_files(folder)
    taken = {file.name for file in files} | {index.name if index else ""}
    others = [p.name for p in folder.iterdir() if p.suffix in WEIGHTS or p.name.endswith(".index.json")]
    model = ("model", "pytorch_model", "consolidated")
    if left := sorted(name for name in others if name.startswith(model) and name not in taken):
        rest = f" and {len(left) - 3} more" if len(left) > 3 else ""
        told = f"neither read nor copied: {', '.join(left[:3])}{rest}"
        warnings.warn(f"{folder}: the model is {files[0].name}, as for transformers; {told}", stacklevel=3)


def stored_in(source: Source) -> Stored:
    """Return the weights in the folder that a model was loaded from."""
    if source.folder is None:
        raise CheckpointError("a GGUF file is not written again")
    return open_checkpoint(source.folder, source.dtype, pickles=source.pickles)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged ({error!r:.200}): fetch it again"
        ) from error


def _unpickled(file: Path) -> Iterator[Entry]:
    """Yield the tensors of a pickle, which is read as plain tensors, never as code."""
    try:
        found = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    except (OSError, RuntimeError, ValueError, EOFError, AttributeError, UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r:.200}): fetch it again") from error
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        yield Made(name, file, tensor.dtype, tuple(tensor.shape), 0, size, unpack=tensor.detach)


def _unpacked(
    found: Mapping[str, Entry], form: Form | None, record: Any, dtype: torch.dtype
) -> Iterator[tuple[str, Entry]]:
    """Yield tensors by name, with weights in place of codes and scales."""
    of_codes, of_scales = SUFFIXES[form] if form else ("", "")
    for name, entry in found.items():
        stem = name.removesuffix(of_codes)
        scales = found.get(stem + of_scales) if form and name.endswith(of_codes) else None
        if scales is not None:
            yield stem, _made(stem, entry, scales, (record or {}).get("weight_block_size"), dtype)
        elif entry.dtype in _EIGHT:
            raise ModelError(
                f"{entry.file}: {name} is {entry.dtype}, and nothing says by which scale: pass the original model"
            )
        elif not (form and name.endswith(of_scales) and name.removesuffix(of_scales) + of_codes in found):
            yield name, entry


def _made(name: str, codes: Entry, scales: Entry, blocks: Any, dtype: torch.dtype) -> Entry:
    shape, unpack = codes.shape, unpack_mxfp4 if blocks is None else partial(unpack_fp8, size=tuple(blocks))
    if blocks is None:
        *rest, out, n, half = codes.shape
        shape = (*rest, 2 * half * n, out)
        fits = codes.dtype == scales.dtype == torch.uint8 and scales.shape == codes.shape[:-1]
    else:
        needed = tuple(math.ceil(n / size) for n, size in zip(codes.shape[-2:], blocks, strict=True))
        fits = scales.dtype.is_floating_point and codes.dtype in _EIGHT and scales.shape[-2:] == needed
    if not fits:
        raise ModelError(
            f"{codes.file}: {codes.name} {list(codes.shape)} does not fit its scales {list(scales.shape)} of blocks of "
            f"{blocks or 32}: pass the original model"
        )
    size = math.prod(shape) * dtype.itemsize
    return Made(name, codes.file, dtype, shape, 0, size, parts=(codes, scales), unpack=unpack)


def auto_dtype(folder: Path, stored: Stored) -> torch.dtype:
    """Return the dtype in which `load` has the weights that are stored in a local folder if none is asked for.

    As transformers has it: that of the configuration, of the index, or of the first floating tensor by name in the first file.
    """
    if stored.form:
        return torch.bfloat16
    try:
        configured = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    except Exception as cause:  # transformers and huggingface_hub have many
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {cause}") from cause
    indexed = (json.loads(stored.index).get("metadata") or {}).get("dtype") if stored.index else None
    for said in (configured, getattr(torch, str(indexed), None)):
        if isinstance(said, torch.dtype):
            return said
    first = stored.shards[0].file
    own = (entry.dtype for _, entry in sorted(stored.entries.items()) if entry.file == first)
    return next((dtype for dtype in own if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def check_folder(folder: Path) -> None:
    """Raise `ModelError` for a folder that holds an adapter: what belongs on a model, not a model."""
    record = folder / "adapter_config.json"
    if not record.is_file():
        return
    try:
        base = json.loads(record.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    raise ModelError(
        f"{str(folder)!r} is an adapter for {base or 'a model that it does not name'}: merge it first, with `model = "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})` and "
        "`model.merge_and_unload().save_pretrained('merged')`, and pass 'merged'"
    )


def is_adapter(name: str) -> bool:
    """Tell whether a name on the Hub is that of an adapter, as far as is known."""
    with suppress(Exception):  # the hub client raises errors of four libraries
        record = "adapter_config.json"
        return isinstance(try_to_load_from_cache(name, record), str) or file_exists(name, record)
    return False


def cached_dtype(name: str, revision: str | None) -> torch.dtype | None:
    """Return the type that the configuration of a name on the Hub states, where that is on this machine; None where it is not."""
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(file, str):
        return None
    record = json.loads(Path(file).read_text(encoding="utf-8"))
    text = record.get("text_config") or record
    stated = next(
        (own[key] for own in (text, record) for key in ("dtype", "torch_dtype") if own.get(key)), "float32"
    )
    found = getattr(torch, str(stated), None)
    return found if isinstance(found, torch.dtype) else None


def _again(files: Iterable[Path], entries: Mapping[str, Entry], form: Form | None) -> Stored:
    """Return weights with places in new files: safetensors with the names of the old ones."""
    shards, placed = [], dict[str, Entry]()
    for file in files:
        own = {name: entry for name, entry in entries.items() if entry.file == file}
        rows = {name: (entry.dtype, entry.shape) for name, entry in own.items()}
        header, places, size = layout(rows, {"format": "pt"})
        stem = file.name.removeprefix("pytorch_").removesuffix(file.suffix)
        shards.append(Shard(file, stem + SUFFIX, header, size))
        for name, entry in own.items():
            at, end = places[name], places[name] + entry.stop - entry.start
            made = isinstance(entry, Made)
            placed[name] = (
                replace(entry, start=at, stop=end) if made else replace(entry, shift=at - entry.start)
            )
    names = {shard.file: shard.name for shard in shards}
    total = sum(entry.stop - entry.start for entry in placed.values())
    where = {name: names[placed[name].file] for name in sorted(placed)}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
    indexed = (
        len(shards) > 1 or shards[0].name != FORMS[0]
    )  # one file of another name is found by an index alone
    return Stored(tuple(shards), placed, form, index if indexed else None)


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of every tensor; each must be a plain name in the index's own folder."""
    try:
        where: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
        ending = {PICKLE if path.name.startswith("pytorch_") else SUFFIX}
        strange = [
            name for name in where.values() if Path(name).name != name or Path(name).suffix not in ending
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.200}): fetch it again") from error
    if strange or not where:
        raise CheckpointError(
            f"{path} names {strange[:1] or 'nothing'}, which is no safetensors file in that folder"
        )
    return where


def _header(file: Path) -> bytes:
    """Return what a file has before its tensors."""
    with file.open("rb") as source:
        first = source.read(8)
        return first + source.read(struct.unpack("<Q", first)[0])
