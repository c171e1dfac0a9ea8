"""Saved models and their side files: plain dense safetensors, a manifest, keep masks, effects.

| file | content |
|---|---|
| `config.json`, `*.safetensors`, … | what `AutoModelForCausalLM.from_pretrained` reads, nothing more |
| `causalprune.json` | manifest: versions, base model, run, zeros per projection, SHA-256 of the files |
| `keep_masks.safetensors` | one bit per weight of each projection, True where it was kept |
| `effects.json` | the measured losses that the factors came from, exact to the bit |
| `README.md` | the model card, written from the manifest; `README.base.md` is that of the base |

The folder appears complete or not at all (`causalprune.checkpoints.placing`).
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalprune.checkpoints.aside import LARGE, aside_of, put_aside, taken_from
from causalprune.checkpoints.card import write_card
from causalprune.checkpoints.carrying import EFFECTS, MANIFEST
from causalprune.checkpoints.placing import complete
from causalprune.checkpoints.writing import read_back, write_model
from causalprune.core import (
    CheckpointError,
    Decoder,
    Effects,
    Made,
    MismatchError,
    Projection,
    Unit,
    git_commit,
    packed,
    plain,
    sync,
    unpacked,
    versions,
    zeros_in,
)
from causalprune.evaluation import Row, write_json
from causalprune.models import ShardWriter, class_for, layout

FORMAT = 1
KEEP = "keep_masks.safetensors"
TENSORS = ("masked_nats", "intact_nats", "tokens", "subset", "kl_nats", "predicted_nats", "curvature_nats")
Keep = Mapping[str, Bool[Tensor, "_ _"]]


def save(  # noqa: PLR0913 (what there is to say of a model)
    decoder: Decoder,
    folder: Path | str,
    made: Made | None = None,
    *,
    manifest: dict[str, Any] | None = None,
    keep: Keep | None = None,
    effects: Effects | None = None,
    overwrite: bool = False,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the model as it is now, with its side files, to `folder`, and return `folder`.

    `made` is what `prune` or `shrink` returned: method, calibration and masks. `manifest` is what else the caller knows of the
    run (JSON values); both become the entry `run`. `keep` maps names of projections to masks. A model that was loaded from
    files is written as those are, with what is another value in memory; configuration and tokenizer are the files' too. What
    was written is read back in part. `beside` are records by the name of their file. On any failure nothing new is left under the final name; where a file cannot be
    written, the error is a `CheckpointError`.
    """
    folder, run = Path(folder), {**(made.record() if made else {}), **(manifest or {})}
    if made is not None:
        keep, effects = made.keep if keep is None else keep, effects or made.effects
    elif keep is not None and not {"method", "shrink", "reapplied"} & run.keys():
        lacks = "method, sparsity and calibration: save(decoder, folder, pruned) writes them too"
        warnings.warn(f"what {folder} says of itself lacks {lacks}", stacklevel=2)
    _check_keep(keep or {}, decoder)
    with complete(folder, overwrite) as temporary:
        stored = write_model(decoder, temporary)
        if keep is not None:
            write_keep(keep, temporary / KEEP)
        if effects is not None:
            save_effects(effects, temporary / EFFECTS)
        for name, record in (beside or {}).items():
            write_json(temporary / name, record)
        dtype = decoder.source.dtype if decoder.source else None
        write_manifest(temporary, decoder, run, [count(p, dtype) for p in decoder.projections])
        read_back(decoder, stored, temporary)
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a saved folder; missing, damaged or too new is a `CheckpointError`."""
    manifest = _read_json(folder / MANIFEST, ("base", "files", "sparsity"))
    if not isinstance(manifest["files"], dict) or "projections" not in manifest["sparsity"]:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: `files` or `sparsity` has another form")
    return manifest


def load_keep(folder: Path) -> dict[str, Bool[Tensor, "_ _"]]:
    """Return the keep masks of a saved folder by name of projection, as `[out in]` on the CPU."""
    return dict(iterate_keep(folder / KEEP))


def write_keep(keep: Keep, path: Path) -> None:
    """Write masks to `path`, eight weights a byte, row by row, with their shapes as metadata."""
    with keep_writer(path, {name: tuple(mask.shape) for name, mask in keep.items()}) as write:
        for name, mask in keep.items():
            write(name, mask)


@contextmanager
def keep_writer(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Callable[[str, Tensor], None]]:
    """Hand out what writes masks of these shapes to `path` one by one, given a name and what stays."""
    sizes = {name: (torch.uint8, ((math.prod(shape) + 7) // 8,)) for name, shape in shapes.items()}
    metadata = {name: ",".join(map(str, shape)) for name, shape in shapes.items()}
    header, places, size = layout(sizes, metadata)
    with closing(ShardWriter(path, header, size)) as file:
        yield lambda name, keep: file.write(places[name], packed(keep))


def iterate_keep(path: Path) -> Iterator[tuple[str, Bool[Tensor, "_ _"]]]:
    """Yield the masks of a `keep_masks.safetensors` one by one, so that a check needs no room for all."""
    try:
        with safe_open(path, "pt") as file:
            for name, shape in (file.metadata() or {}).items():
                out, into = map(int, shape.split(","))
                yield name, unpacked(file.get_tensor(name).numpy(), (out, into))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"keep masks {path} cannot be read: {error}") from error


def save_effects(effects: Effects, path: Path) -> None:
    """Write `effects` to `path`, atomically, large tables into a file beside it; every float comes back bit for bit."""
    tensors = {name: getattr(effects, name) for name in TENSORS if getattr(effects, name) is not None}
    record = {
        "format": FORMAT,
        "model_fingerprint": effects.model_fingerprint,
        "calibration_fingerprint": effects.calibration_fingerprint,
        "description": effects.description,
        "effect": effects.effect,
        "units": [[unit.layer, unit.index, unit.kind] for unit in effects.units],
        **{
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "values": _swapped(tensor.tolist(), math.nan, None) if tensor.ndim > 1 else tensor.tolist(),
            }
            for name, tensor in tensors.items()
            if tensor.numel() <= LARGE
        },
    }
    temporary = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        _write_json(temporary, record | put_aside(tensors, path))
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write effects to {path}: {error}") from error


def load_effects(path: Path | str, decoder: Decoder | None = None) -> Effects:
    """Return the effects in `path`; those of a model other than `decoder` raise `MismatchError`."""
    path = Path(path)
    record = _read_json(path, ("masked_nats", "intact_nats", "tokens", "subset", "units"))
    aside = aside_of(path, record)
    try:
        effects = Effects(
            units=tuple(Unit(layer, index, kind) for layer, index, kind in record["units"]),
            **{name: _tensor(record[name], aside) for name in TENSORS if name in record},
            effect=record["effect"],
            model_fingerprint=record["model_fingerprint"],
            calibration_fingerprint=record["calibration_fingerprint"],
            description=record["description"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): measure the effects again") from error
    if effects.masked_nats.shape != (len(effects.units), len(effects.intact_nats)):
        raise CheckpointError(
            f"{path} is damaged: masked_nats has shape {list(effects.masked_nats.shape)} for "
            f"{len(effects.units)} units and {len(effects.intact_nats)} sequences: measure the effects again"
        )
    if decoder is not None and effects.model_fingerprint != decoder.fingerprint:
        raise MismatchError(
            f"{path} holds effects of another model (fingerprint {effects.model_fingerprint[:12]}…) than "
            f"{decoder.name} ({decoder.fingerprint[:12]}…): measure the effects of this model"
        )
    return effects


def count_zeros(decoder: Decoder) -> dict[str, Any]:
    """Count the zeros of every projection: `{weights, zeros, sparsity, projections: […]}`."""
    return summed([count(p) for p in decoder.projections])


def summed(projections: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of all projections with their sums."""
    weights, zeros = (sum(row[key] for row in projections) for key in ("weights", "zeros"))
    return {
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / max(weights, 1),
        "projections": projections,
    }


def count(projection: Projection, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Count the zeros of one projection in the dtype of its file, as the manifest has them."""
    weight = projection.read()
    return {
        "name": projection.name,
        "parameter": projection.parameter_name,
        "expert": projection.expert,
        "shape": list(projection.shape),
        "weights": projection.size,
        "zeros": zeros_in(weight if dtype is None else weight.to(dtype)),
    }


def write_manifest(
    folder: Path, decoder: Decoder, run: dict[str, Any], projections: list[dict[str, Any]]
) -> None:
    """Write the manifest of the files that are in `folder`, and the model card that goes with it."""
    hashed = sorted([*folder.glob("*.safetensors"), *folder.glob(EFFECTS)])
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_file, hashed))
    record = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
        "base": {"name": decoder.name, "revision": decoder.revision, "fingerprint": decoder.fingerprint},
        "loader": {
            "class": class_for(decoder.model.config).__name__,
            "code": bool(decoder.source and decoder.source.code),
        },
        "run": run,
        "sparsity": summed(projections),
        "files": {path.name: digest for path, digest in zip(hashed, hashes, strict=True)},
    }
    _write_json(folder / MANIFEST, plain(record), indent=1)
    write_card(folder, record, title=folder.name.partition(".partial-")[0])


def describe(folder: Path, rows: Sequence[Row], label: str) -> None:
    """Write results into the model card of a saved folder, if there is one: those of the row `label` beside dense."""
    if (folder / MANIFEST).exists():
        write_card(folder, read_manifest(folder), [row for row in rows if row[0] in ("dense", label)])


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_keep(keep: Keep, decoder: Decoder) -> None:
    shapes = {p.name: p.shape for p in decoder.projections}
    for name, mask in keep.items():
        if tuple(mask.shape) != shapes.get(name):
            raise CheckpointError(
                f"keep mask of {name!r} has shape {list(mask.shape)}, its projection {shapes.get(name)}"
            )


def _tensor(record: dict[str, Any], aside: bytes) -> Tensor:
    if "at" in record:
        return taken_from(aside, record)
    return torch.tensor(_swapped(record["values"], None, math.nan), dtype=getattr(torch, record["dtype"]))


def _swapped(values: Any, old: float | None, new: float | None) -> Any:
    """Return nested lists with one value in place of another: JSON has null, tensors have NaN."""
    if isinstance(values, list):
        return [_swapped(value, old, new) for value in values]
    return new if values is old or (old is not None and math.isnan(values)) else values


def _write_json(path: Path, record: dict[str, Any], indent: int | None = None) -> None:
    text = json.dumps(record, allow_nan=False, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path, required: tuple[str, ...]) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a file of format {FORMAT} of causalprune: was it written by a newer one?"
        )
    if missing := [key for key in required if key not in record]:
        raise CheckpointError(f"{path} is damaged: it has no entry {missing[0]!r}")
    return record
