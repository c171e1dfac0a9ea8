"""Zeros of a GGUF file against those that its matrices had before they were quantised."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causalprune.checkpoints import Finding, Verification
from causalprune.core import CheckpointError, Progress, silent
from causalprune.shipping.converting import convert
from causalprune.shipping.files import TENSORS, ZEROS, Held, counted, field, opened, shape_of
from causalprune.shipping.uneven import DECI, compacted


def looked_into(path: Path, *, zeros: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Return what `causalprune inspect` shows of a GGUF file: what it says, and its matrices by type, with their zeros if asked.

    Zeros are counted in the weights as they come out of their types, which reads the whole file.
    """
    reader = opened(path)
    own = field(reader, "general.architecture")
    matrices = counted(reader, progress) if zeros else _uncounted(reader)
    types: dict[str, dict[str, int]] = {}
    for held in matrices:
        row = types.setdefault(held.type, {"matrices": 0, "weights": 0, "bytes": 0})
        for key, value in (("matrices", 1), ("weights", held.weights), ("bytes", held.bytes)):
            row[key] += value
        if held.zeros is not None:
            row["zeros"] = row.get("zeros", 0) + held.zeros
    found = {
        "architecture": own,
        "name": field(reader, "general.name"),
        "layers": field(reader, f"{own}.block_count"),
        "tokens": field(reader, "tokenizer.ggml.tokens", length=True),
        "bytes": path.stat().st_size,
        "types": dict(sorted(types.items())),
    }
    promised = _promised(reader)
    return {
        **found,
        "zeros_before_quantising": sum(promised.values()) if promised else None,
        "tensors": matrices,
    }


def _uncounted(reader: Any) -> list[Held]:
    return [
        Held(t.name, t.tensor_type.name, shape_of(t), int(t.n_bytes))
        for t in reader.tensors
        if len(t.shape) > 1
    ]


def verify_file(
    path: Path, against: Path | None = None, *, trust: bool = False, progress: Progress = silent
) -> Verification:
    """Compare the zeros of a GGUF file with those of the checkpoint that it was made from, matrix by matrix.

    `export` leaves these in the file; of any other file the checkpoint is asked (`against`), through llama.cpp's converter,
    which runs code of its tokenizer with `trust`.

    Raises:
        CheckpointError: the file does not say what it had, and no checkpoint is named.
        ModelError: it cannot be read as GGUF.
    """
    reader = opened(path)
    cut = (
        field(reader, "tokenizer.ggml.pre") or ""
    )  # as it was converted, whether the converter knows the tokenizer or not
    uneven = field(reader, "general.architecture") == DECI
    promised = _promised(reader) if against is None else _converted(against, cut, trust, uneven=uneven)
    if promised is None:
        raise CheckpointError(
            f"{path} does not say which zeros it had before it was quantised, as it was not written by `causalprune export`: "
            "name the checkpoint that it was made from with --against"
        )
    found = counted(reader, progress)
    findings = list(_findings(promised, found))
    weights, zeros = sum(own.weights for own in found), sum(own.zeros or 0 for own in found)
    return Verification(path, len(found), weights, zeros, tuple(findings))


def _findings(promised: Mapping[str, int], found: list[Held]) -> Any:
    """Yield what is absent, and every matrix with fewer zeros than before."""
    held = {own.name: own for own in found}
    for name in promised.keys() ^ held.keys():
        where = "the file" if name in held else "what it was made from"
        yield Finding(name, "shape", f"{name} is only in {where}")
    for name, before in promised.items():
        own = held.get(name)
        if own is not None and (own.zeros or 0) < before:
            yield Finding(
                name, "lost", f"{name} ({own.type}): {own.zeros:,} zeros, {before:,} before it was quantised"
            )


def _promised(reader: Any) -> dict[str, int] | None:
    names, zeros = field(reader, TENSORS), field(reader, ZEROS)
    return None if names is None or zeros is None else dict(zip(names, zeros, strict=True))


def _converted(folder: Path, pre_tokenizer: str, trust: bool, *, uneven: bool) -> dict[str, int]:
    """Return the zeros of a checkpoint by the names that its matrices have in GGUF, `uneven` without what is zero as a whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch) / "model.gguf"
        convert(folder, file, pre_tokenizer=pre_tokenizer, trust_remote_code=trust)
        if uneven:
            whole, file = file, Path(scratch) / "uneven.gguf"
            compacted(opened(whole), file)
        return {own.name: own.zeros or 0 for own in counted(opened(file))}
