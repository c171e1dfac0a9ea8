"""General text that takes no download: the intact model writes it, and every version of the model is measured on it.

In `own` of the cache folder a text is two files, named by model, use, tokens, piece, seed and version:

| file | content |
|---|---|
| `….ledger` | its pieces (`sampling`), each on disk as soon as its batch is written |
| `….hidden` | what the intact model sends to its final norm, in its own dtype: all that is needed to make its logits again |
"""

import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.calibration import OWN_TEXT, batches, check_tokenizer, content_hash, with_limit
from causalprune.core import (
    AtOnce,
    Batch,
    CheckpointError,
    DataError,
    Decoder,
    Example,
    MismatchError,
    OptionError,
    Progress,
    silent,
    sync,
)
from causalprune.evaluation.answering import scorer_in
from causalprune.evaluation.pieces import Text, lacking, pieces_of, version_of
from causalprune.evaluation.settings import Settings
from causalprune.evaluation.tasks.repeating import TRAITS
from causalprune.interventions import (
    LayerInputs,
    Targets,
    by_row,
    cross_entropy,
    divergence,
    entered_at,
    last_hidden,
    parts_of,
    selected,
    target_logits,
    targets,
)
from causalprune.models import fingerprint, frame_fingerprint, positions

Found = TypeVar("Found")
OWN_TASKS = ("own_ppl", "own_kl")
AND = " and "
"""Between the names of tasks that are measured together."""
TOKENS, PIECE = 4096, 512
CHUNK = 256
"""Positions whose logits exist at once: bounds the memory that large vocabularies take."""


def on_general_text(task: str) -> bool:
    """Tell whether a task, with its limit or without, measures general text (`_ppl`, `_kl`) and not what a user is after."""
    return with_limit(task)[0].endswith(("_ppl", "_kl"))


def together(tasks: Sequence[str], scorers: Iterable[str] = ()) -> list[tuple[str, ...]]:
    """Return the tasks in groups of which each takes one pass.

    Together are measures of the same text of the model's own, and those of how it goes on after the same prompts, by names that
    are no scorer's.
    """
    groups: dict[Any, list[str]] = {}
    for task in dict.fromkeys(tasks):
        name, limit = with_limit(task)
        source, _, measure = name.rpartition("_")
        goes_on = measure in TRAITS and not scorer_in(name, scorers)
        shared: Any = ("own", limit) if name in OWN_TASKS else (source, limit) if goes_on else task
        groups.setdefault(shared, []).append(task)
    return [tuple(group) for group in groups.values()]


@dataclass(frozen=True, eq=False)
class OwnText:
    """A text that is measured: its documents, and the task that they are for."""

    text: Text
    task: str
    documents: list[Example]

    @property
    def digest(self) -> str:
        """SHA-256 of its tokens."""
        return hashlib.sha256(repr([(e.tokens, e.target_start) for e in self.documents]).encode()).hexdigest()


def own_text(decoder: Decoder, name: str, tokens: int, seed: int, on_progress: Progress = silent) -> OwnText:
    """Return the text that the intact version of a model writes, from the cache; an intact model writes what is missing.

    Raises:
        DataError: it is not in the cache, and this model is not the intact one, or cannot write.
    """
    check_tokenizer(decoder.tokenizer)
    task, base = f"{name}:{tokens}", decoder.base or {"fingerprint": decoder.fingerprint}
    if base["fingerprint"] is None:
        raise DataError(
            f"{task}: the model that {decoder.name} was made from writes the text, and its causalprune.json does not say "
            "which it was (an earlier release did not note it of smaller models): make it anew"
        )
    text = measured_text(decoder, tokens, seed, base["fingerprint"])
    documents = list(_documents(decoder.tokenizer, pieces_of(decoder, text, task, on_progress)))
    if not documents:
        raise DataError(f"{task}: that is too short a text; the limit counts tokens, as in {name}:{TOKENS}")
    return OwnText(text, task, documents)


def measured_text(decoder: Decoder, tokens: int, seed: int, written_by: str | None = None) -> Text:
    """Return what a text that is measured depends on; who it is `written_by` is this model, or a fingerprint."""
    model, piece = written_by or decoder.fingerprint, _piece(decoder, PIECE)
    return Text(model, "measured", tokens, piece, seed, version_of(decoder))


def own_texts(decoder: Decoder, tasks: Sequence[str], settings: Settings) -> list[Text]:
    """Return the texts that tasks measure and that a model, the intact one, has to write."""
    jobs = [with_limit(task) for task in tasks]
    sizes = {limit or settings.limit or TOKENS for name, limit in jobs if name in OWN_TASKS}
    return [measured_text(decoder, size, settings.seed) for size in sorted(sizes)]


def own_pieces(
    decoder: Decoder,
    count: int,
    max_tokens: int,
    seed: int,
    on_progress: Progress = silent,
    beside: Sequence[Text] = (),
) -> list[Example]:
    """Return pieces of text that a model writes, to calibrate on: all tokens but the first are predicted.

    They are drawn by other random numbers than any text that is measured. Where they have to be written, so is what is
    missing of the texts `beside` them, as many pieces at once take little longer than a few.
    """
    if decoder.device.type == "meta":
        raise OptionError(
            f"{OWN_TEXT} needs a model in memory, which writes: name other text, as --preserve c4, or pass --no-stream"
        )
    check_tokenizer(decoder.tokenizer)
    size = _piece(decoder, min(PIECE, max_tokens))
    text = Text(decoder.fingerprint, "calibration", count * size, size, seed, version_of(decoder))
    rows = pieces_of(decoder, text, OWN_TEXT, on_progress, beside)
    return [_example(decoder.tokenizer, row["tokens"], 1) for row in rows]


def own_measures(
    decoder: Decoder,
    own: OwnText,
    wanted: Collection[str],
    max_batch_tokens: int,
    on_progress: Progress = silent,
) -> dict[str, list[float]]:
    """Return the divergence, and what else is `wanted` of `OWN_TASKS`, of each document, summed over its targets, by one pass.

    `own_ppl` is the loss; `own_kl` is KL(intact ‖ this model), for which the head runs twice; 0 for the intact model itself,
    with a pass where the cache has not yet what others need.

    Raises:
        DataError: what the intact model makes of its text is not in the cache.
        MismatchError: embedding, final norm or head are not the intact model's.
    """
    groups = batches(own.documents, max_batch_tokens=max_batch_tokens)
    path = own.text.path.with_suffix(".hidden")
    hidden, intact = _hidden(path, own, decoder), fingerprint(decoder.model) == own.text.model
    if hidden is None and not intact:
        raise lacking(decoder, own.text, own.task)
    if hidden is not None and intact and len(wanted) == 1:
        return {"own_kl": [0.0] * len(own.documents)}
    found = by_example(groups, partial(_seen, decoder, None if intact else hidden), on_progress)
    if hidden is None:
        _keep(path, own, decoder, [document.hidden for document in found])
    every = {"own_ppl": [d.nats for d in found], "own_kl": [d.divergence for d in found]}
    return {name: every[name] for name in wanted}


class _Document(NamedTuple):
    """What a model makes of a document: nats summed over its targets, and what it sends to its final norm."""

    nats: float
    divergence: float
    hidden: Float[Tensor, "time model"]


def _seen(decoder: Decoder, hidden: Sequence[Tensor] | None, batch: Batch) -> list[_Document]:
    """Return what a model makes of documents, the logits of some positions at a time; None: it is the intact one."""
    after, wanted = len(decoder.layers), targets(batch)
    losses, nats = list[Tensor](), list[Tensor]()
    with torch.inference_mode():
        found = last_hidden(decoder, batch)
        own = found.hidden[after]
        intact = torch.zeros_like(own)
        for row, i in zip(intact, batch.indices, strict=True):
            if hidden is not None:
                row[: len(hidden[i])] = hidden[i]
        for part, _ in parts_of(wanted, CHUNK):
            logits = _logits(decoder, batch, part, found)
            losses.append(cross_entropy(logits, part))
            if hidden is not None:
                expected = _logits(decoder, batch, part, LayerInputs({after: intact}, found.as_tuple))
                nats.append(divergence(expected, torch.arange(len(logits)), logits))
        loss = by_row(torch.cat(losses), wanted).tolist()
        kl = by_row(torch.cat(nats), wanted).tolist() if nats else [0.0] * len(loss)
        sent = [row[:length].cpu().clone() for row, length in zip(own, batch.lengths.tolist(), strict=True)]
    return list(map(_Document, loss, kl, sent))


def _logits(
    decoder: Decoder, batch: Batch, part: Targets, inputs: LayerInputs
) -> Float[Tensor, "target vocab"]:
    with entered_at(decoder, len(decoder.layers), inputs):
        return target_logits(decoder, batch, part)


def by_example(
    groups: Sequence[Batch], work: Callable[[Batch], list[Found]], on_progress: Progress
) -> list[Found]:
    """Return what `work` finds for each example of the batches, in the order of the examples."""
    found: dict[int, Found] = {}
    total, at_once = sum(len(group.indices) for group in groups), AtOnce()
    on_progress(0, total)
    for group in groups:

        def some(rows: list[int], own: Batch = group) -> list[Found]:
            return work(selected(own, rows))

        own = at_once(len(group.indices), group.tokens.shape[1], some)
        found |= zip(group.indices, itertools.chain(*own), strict=True)
        on_progress(len(found), total)
    return [found[i] for i in sorted(found)]


def _hidden(path: Path, own: OwnText, decoder: Decoder) -> list[Tensor] | None:
    """Return what the intact model sends to its final norm, by document; None where that is not known of this text."""
    if not path.exists():
        return None
    try:
        record = torch.load(path, weights_only=True, mmap=True)
        frame, text, hidden = record["frame"], record["text"], record["hidden"]
    except Exception as error:  # torch has many for a damaged file
        warnings.warn(f"{path} is damaged, and of no use: {error}", stacklevel=2)
        return None
    if frame != frame_fingerprint(decoder):
        raise MismatchError(
            f"{own.task}: embedding, final norm or head of {decoder.name} differ from the intact model's, in values or in "
            f"dtype: load both alike, or measure {OWN_TASKS[0]} only"
        )
    return list(hidden) if text == own.digest else None


def _keep(path: Path, own: OwnText, decoder: Decoder, hidden: list[Tensor]) -> None:
    """Write what others will need: complete on disk before it gets its name."""
    draft = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        torch.save({"frame": frame_fingerprint(decoder), "text": own.digest, "hidden": hidden}, draft)
        sync(draft)
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch's own for a full disk
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _piece(decoder: Decoder, size: int) -> int:
    """Return the tokens of a piece: what the model has positions for."""
    return min(size, positions(decoder.model.config) or size)


def _documents(tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> Iterator[Example]:
    """Yield the documents of pieces; one of which a piece holds the beginning alone has nothing to predict."""
    for row in rows:
        tokens, given = row["tokens"], set(row["given"])
        begins = [at for at in sorted(given) if at - 1 not in given]
        for begin, end in itertools.pairwise([*begins, len(tokens)]):
            start = sum(begin <= at < end for at in given)
            if start < end - begin:
                yield _example(tokenizer, tokens[begin:end], start)


def _example(tokenizer: Any, tokens: list[int], start: int) -> Example:
    return Example(tuple(tokens), start, OWN_TEXT, content_hash(tokenizer.decode(tokens)))
