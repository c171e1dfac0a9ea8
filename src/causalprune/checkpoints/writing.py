"""A model in memory as files: those that it was loaded from, written again, or where there are none transformers' own.

What goes out is what came in, but for weights that are others in memory: tensors keep name, shape, dtype, shard and bits.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalprune.checkpoints.carrying import CONFIG, carry
from causalprune.core import CheckpointError, Decoder, ModelError, Source, size_of
from causalprune.models import TOKENIZER_FILES, Entry, Stored, open_checkpoint, raw_bytes, stored_in

SAMPLE = 3
"""Matrices of the first and of the last layer that are read back."""


class WrittenError(CheckpointError):
    """What was written is not what was to be written."""


def write_model(decoder: Decoder, folder: Path) -> Stored | None:
    """Write weights, configuration and all that goes along; return the files that were written again, if that could be."""
    stored, source = _fitting(decoder), decoder.source
    if stored is None:
        _by_transformers(decoder, folder)
    else:
        _again(decoder, stored, folder)
    carry(decoder, folder)
    if stored is None and source is not None:
        _warn_lost(decoder, source, folder)
    generation = getattr(decoder.model, "generation_config", None)
    if stored is None and generation is not None and not (folder / "generation_config.json").exists():
        generation.to_json_file(folder / "generation_config.json", use_diff=True)
    names = getattr(decoder.tokenizer, "vocab_files_names", {}).values()  # without any, the rest is of no use
    files = any(any(folder.glob(own)) for own in TOKENIZER_FILES)
    whole = not names or any((folder / name).exists() for name in names)
    if decoder.tokenizer is not None and not (files and whole):
        decoder.tokenizer.save_pretrained(folder)
        for_older_tokenizers(folder)
    return stored


def warn_unpacked(decoder: Decoder) -> None:
    """Warn, before any work, that a packed model is written unpacked, and what that takes."""
    if (source := decoder.source) and source.form:
        form, dtype = source.form.upper(), str(source.dtype).removeprefix("torch.")
        size = f"{size_of(decoder).bytes / 1e9:.2f} GB"
        warnings.warn(
            f"{decoder.name} is packed ({form}): it is written unpacked, in {dtype}, {size}", stacklevel=3
        )


def round_as_written(decoder: Decoder) -> None:
    """Round what was changed of a model, in place, to the dtype of its files: it is then what is loaded from its checkpoint."""
    model, source = decoder.model, decoder.source
    if source is None or source.dtype == model.dtype:
        return
    changed = model.parameters() if source.reshaped else (p.parameter for p in decoder.projections)
    for weight in {id(own): own for own in changed}.values():
        if weight.dtype == model.dtype and not weight.is_meta:
            weight.data.copy_(weight.data.to(source.dtype))


def unknown_tensors(decoder: Decoder) -> list[Entry]:
    """Return what the files of a model hold and its class does not know: it is written again as it is."""
    source = decoder.source
    if source is None or source.folder is None or source.reshaped:
        return []
    entries = stored_in(source).entries
    known = {name for name, _ in _named(decoder.model, _bare(decoder), entries)}
    return [entry for name, entry in entries.items() if name not in known]


def read_back(decoder: Decoder, stored: Stored | None, folder: Path) -> None:
    """Read what was written of a model in memory, and compare it: see `check_written`."""
    entries = (stored or open_checkpoint(folder)).entries
    layers, model = _by_layer(decoder), decoder.model
    ends = [layers[f"{decoder.layers[i].name}."] for i in (0, -1)]
    matrices = ((pair for pair in _named(model, state, entries) if pair[1].ndim > 1) for state in ends)
    check_written(folder, stored, (pair for own in matrices for pair in islice(own, SAMPLE)))


def check_written(folder: Path, expected: Stored | None, values: Iterable[tuple[str, Tensor]]) -> None:
    """Compare names, shapes and dtypes of all tensors in a folder with those expected, and some with their values.

    Raises:
        WrittenError: there is a difference.
    """
    found = open_checkpoint(folder).entries
    wrong = [] if expected is None else sorted(expected.entries.keys() ^ found.keys())
    for name, entry in {} if expected is None or wrong else expected.entries.items():
        if (entry.shape, entry.dtype) != (found[name].shape, found[name].dtype):
            wrong.append(name)
    for name, value in () if wrong else values:
        if not (value.is_meta or (name in found and _alike(found[name].read(), value.cpu()))):
            wrong.append(name)
    if wrong:
        raise WrittenError(
            f"{wrong[0]} was not written as it is in memory ({len(wrong)} such tensors were found)"
        )


def _alike(written: Tensor, value: Tensor) -> bool:
    """Tell whether all values of two tensors are equal in the dtype of one of them: what was changed is rounded, the rest is as it was."""
    if written.shape != value.shape:
        return False
    same = (written.to(value.dtype) == value) | (written == value.to(written.dtype))
    return bool((same | (written.isnan() & value.isnan())).all())


def _fitting(decoder: Decoder) -> Stored | None:
    """Return the files that a model was loaded from if they have a place for all that it has in memory."""
    source = decoder.source
    if source is None or source.folder is None or source.reshaped:
        return None
    try:
        stored = stored_in(source)
    except (CheckpointError, ModelError) as error:
        why = str(error)
    else:
        model, found = decoder.model, stored.entries
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        alone = {*tied, *tied.values()}  # files may hold one of two
        for name, value in _named(model, _bare(decoder), found):
            if found[name].shape != tuple(value.shape) if name in found else name not in alone:
                why = f"{name} {list(value.shape)} of the model has no place in them"
                break
        else:
            return stored
    warnings.warn(
        f"{decoder.name}: its files cannot be written again ({why}); the new ones have names, dtype and shards as "
        "transformers chooses, and no tensors that it does not know",
        stacklevel=5,
    )
    return None


def _bare(decoder: Decoder) -> dict[str, Tensor]:
    """Return what a model has by name, without values."""
    return {name: value.to("meta") for name, value in decoder.model.state_dict().items()}


def _named(
    model: Any, state: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a model in the form that files have, by their names in files."""
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415  reading must not need it

    prefix = f"{model.base_model_prefix}."
    for name, value in revert_weight_conversion(model, dict(state)).items():
        names = (name, prefix + name, name.removeprefix(prefix))
        fits = (own for own in names if own in entries and entries[own].shape == tuple(value.shape))
        yield next(fits, name), value


def _by_layer(decoder: Decoder) -> dict[str, dict[str, Tensor]]:
    """Return what a model has by the names of its layers, all else under the empty name."""
    heads = [f"{layer.name}." for layer in decoder.layers]
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in decoder.model.state_dict().items():
        head = next((head for head in heads if name.startswith(head)), "")
        found.setdefault(head, {})[name] = value
    return found


def _again(decoder: Decoder, stored: Stored, folder: Path) -> None:
    """Write the files of a model again, with what it has in memory in their places."""
    left = dict(stored.entries)
    with stored.writers(folder) as writers:
        for head, state in _by_layer(decoder).items():
            for name, value in _named(decoder.model, state, stored.entries):
                if name in left and not value.is_meta:  # not tied, nor offloaded and unchanged
                    entry = left.pop(name)
                    data = _in_files(entry, value, pruned=bool(head) and value.ndim > 1)
                    writers[entry.file].write(entry.place, raw_bytes(data))
        for entry in left.values():
            for at, piece in entry.chunks():
                writers[entry.file].write(at, piece)


def _in_files(entry: Entry, value: Tensor, *, pruned: bool) -> Tensor:
    """Return a tensor in the dtype of its file: with the file's own bits where it is the same in memory.

    Where it may be `pruned`, zeros stay zeros, though files may hold what is too small for the dtype in memory.
    """
    if value.dtype == entry.dtype:
        return value
    was, value = entry.read(), value.cpu()
    same = was.to(value.dtype) == value
    if pruned:
        same &= value != 0
    return torch.where(same, was, value.to(entry.dtype))


def _by_transformers(decoder: Decoder, folder: Path) -> None:
    """Let transformers write weights and configuration, in the dtype of the source where there is one."""
    from transformers.utils import logging  # noqa: PLC0415  reading side files must not need transformers

    model, source = decoder.model, decoder.source
    dtype = source.dtype if source else model.dtype
    generation, bars = getattr(model, "generation_config", None), logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        if generation is not None:  # published ones do not always pass the checks made on saving
            model.generation_config = type(generation)()
        model.save_pretrained(folder, max_shard_size="5GB", state_dict=_cast(model, dtype))
    finally:
        if generation is not None:
            model.generation_config = generation
        if bars:
            logging.enable_progress_bar()
    (folder / "generation_config.json").unlink(missing_ok=True)
    _for_older_readers(folder / CONFIG, str(dtype).removeprefix("torch."))
    for path in folder.glob("*.safetensors"):  # safetensors makes them readable to their owner alone
        path.chmod((folder / CONFIG).stat().st_mode)


def _warn_lost(decoder: Decoder, source: Source, folder: Path) -> None:
    """Warn of tensors in the source that the model's class does not know, so that new files lack them."""
    try:
        before = stored_in(source).entries
    except (CheckpointError, ModelError):
        return
    config = json.loads((source.folder / CONFIG).read_text(encoding="utf-8")) if source.folder else {}
    whole = int(
        config.get("text_config", config).get("num_hidden_layers") or 2**31
    )  # where it has another name: all of them
    after = {_levelled(decoder, name, whole) for name in open_checkpoint(folder).entries}
    tied = getattr(decoder.model, "all_tied_weights_keys", None) or {}
    if lost := sorted(n for n in before if _levelled(decoder, n, whole) not in after and n not in tied):
        kind = type(decoder.model).__name__
        warnings.warn(
            f"not in the new files: {len(lost)} tensors that a {kind} does not know, such as {lost[0]}",
            stacklevel=5,
        )


def _levelled(decoder: Decoder, name: str, whole: int) -> str:
    """Return a name without its numbers, but for that of a layer beyond the `whole` model's, which predicts further tokens."""
    home = re.escape(decoder.layers[0].name.rpartition(".")[0])
    beyond = re.match(rf"{home}\.(\d+)\.", name)
    kept = beyond[1] if beyond and int(beyond[1]) >= whole else "#"
    return f"{kept} {re.sub(r'[0-9]+', '#', name)}"


def _cast(model: Any, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """Return what a model has in another dtype, tied tensors once; None where it has that dtype."""
    if model.dtype == dtype:
        return None
    state = model.state_dict(keep_vars=True)
    cast = {
        id(own): own.detach().to(dtype if own.dtype == model.dtype else own.dtype) for own in state.values()
    }
    return {name: cast[id(own)] for name, own in state.items()}


def _for_older_readers(config: Path, dtype: str) -> None:
    """Say of rotary embeddings what transformers 4 looks for elsewhere: it would take defaults, and not say so."""
    record = json.loads(config.read_text(encoding="utf-8")) | {"dtype": dtype}
    own = record.get("rope_parameters")
    if isinstance(own, dict) and "rope_theta" in own:  # else none, or some for every kind of layer
        apart = {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if key in own}
        scaling = {key: value for key, value in own.items() if key not in apart}
        scaled = scaling.get("rope_type", "default") != "default"
        record = {**apart, **({"rope_scaling": scaling} if scaled else {}), **record}
    config.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def for_older_tokenizers(folder: Path) -> None:
    """Say of a tokenizer what transformers 4 knows: its class, and further special tokens, by the names of then."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    record = before = json.loads(path.read_text(encoding="utf-8"))
    if record.get("tokenizer_class") == "TokenizersBackend":
        record = record | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(record.get("extra_special_tokens"), list):
        known = {key: value for key, value in record.items() if key != "extra_special_tokens"}
        record = known | {"additional_special_tokens": record["extra_special_tokens"]}
    if record != before:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
