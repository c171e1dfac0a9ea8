"""General text that takes no download: the intact model writes it, and every version of the model is measured on it.

In `own` of the cache folder a text is two files, named by model, use, tokens, piece, seed and version:

| file | content |
|---|---|
| `….ledger` | its pieces (`sampling`), each on disk as soon as its batch is written |
| `….hidden` | what the intact model sends to its final norm, in its own dtype: all that is needed to make its logits again |
"""

import contextlib
import hashlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
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
    Ledger,
    MismatchError,
    OptionError,
    Progress,
    cache_folder,
    read_rows,
    silent,
    sync,
)
from causalprune.evaluation.sampling import Piece, write
from causalprune.interventions import (
    LayerInputs,
    by_row,
    divergence,
    entered_at,
    last_hidden,
    selected,
    target_logits,
    targets,
)
from causalprune.models import fingerprint, frame_fingerprint, positions

Found = TypeVar("Found")
OWN_TASKS = ("own_ppl", "own_kl")
VERSION = 1
"""Of the way in which a text is written: with another one it is another text."""
TOKENS, PIECE = 4096, 512
BATCH = 16
"""Pieces that are written at once, at most."""
CHUNK = 256
"""Positions whose logits exist at once: bounds the memory that large vocabularies take."""


def on_general_text(task: str) -> bool:
    """Tell whether a task, with its limit or without, measures general text (`_ppl`, `_kl`) and not what a user is after."""
    return with_limit(task)[0].endswith(("_ppl", "_kl"))


@dataclass(frozen=True)
class Text:
    """What a text depends on: the fingerprint of the model that writes it, its size, and the seed.

    What is `measured` and what calibrates are drawn by other random numbers, whatever their seeds.
    """

    model: str
    use: Literal["measured", "calibration"]
    tokens: int
    piece: int
    seed: int

    @property
    def path(self) -> Path:
        """Where its pieces are kept."""
        name = "-".join(map(str, (self.model[:16], *list(asdict(self).values())[1:], VERSION)))
        return cache_folder() / "own" / f"{name}.ledger"

    def uniforms(self) -> Float[Tensor, "piece time"]:
        """Return a random number for every token; a shorter text has the first ones of a longer one."""
        seed = hashlib.sha256(f"{self.use}:{self.seed}".encode()).digest()
        shape = math.ceil(self.tokens / self.piece), self.piece
        return torch.from_numpy(np.random.default_rng([*seed]).random(shape, dtype=np.float32))


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
    text = Text(base["fingerprint"], "measured", tokens, _piece(decoder, PIECE), seed)
    documents = list(_documents(decoder.tokenizer, _pieces(decoder, text, task, on_progress)))
    if not documents:
        raise DataError(f"{task}: that is too short a text; the limit counts tokens, as in {name}:{TOKENS}")
    return OwnText(text, task, documents)


def own_pieces(
    decoder: Decoder, count: int, max_tokens: int, seed: int, on_progress: Progress = silent
) -> list[Example]:
    """Return pieces of text that a model writes, to calibrate on: all tokens but the first are predicted.

    They are drawn by other random numbers than any text that is measured.
    """
    if decoder.device.type == "meta":
        raise OptionError(f"{OWN_TEXT} needs a model that writes: leave out --stream, or take wikitext2")
    check_tokenizer(decoder.tokenizer)
    size = _piece(decoder, min(PIECE, max_tokens))
    text = Text(decoder.fingerprint, "calibration", count * size, size, seed)
    rows = _pieces(decoder, text, OWN_TEXT, on_progress)
    return [_example(decoder.tokenizer, row["tokens"], 1) for row in rows]


def own_divergences(
    decoder: Decoder, own: OwnText, max_batch_tokens: int, on_progress: Progress = silent
) -> list[float]:
    """Return KL(intact ‖ this model) summed over the targets of each document, in nats; 0 for the intact model itself.

    One forward pass, and the head twice; for the intact model a pass where the cache has not yet what others need.

    Raises:
        DataError: what the intact model makes of its text is not in the cache.
        MismatchError: embedding, final norm or head are not the intact model's.
    """
    path, after = own.text.path.with_suffix(".hidden"), len(decoder.layers)
    hidden, groups = _hidden(path, own, decoder), batches(own.documents, max_batch_tokens=max_batch_tokens)

    def sent(batch: Batch) -> list[Tensor]:
        found = last_hidden(decoder, batch).hidden[after].cpu()
        return [row[:length].clone() for row, length in zip(found, batch.lengths.tolist(), strict=True)]

    if fingerprint(decoder.model) == own.text.model:
        if hidden is None:
            _keep(path, own, decoder, by_example(groups, sent, on_progress))
        return [0.0] * len(own.documents)
    if hidden is None:
        raise _lacking(decoder, own.text, own.task)
    return by_example(groups, partial(_kl, decoder, hidden), on_progress)


def _kl(decoder: Decoder, hidden: Sequence[Tensor], batch: Batch) -> list[float]:
    """Return the divergence summed over the targets of each document, the logits of some positions at a time."""
    after, wanted, nats = len(decoder.layers), targets(batch), []
    with torch.inference_mode():
        found = last_hidden(decoder, batch)
        intact = torch.zeros_like(found.hidden[after])
        for row, i in zip(intact, batch.indices, strict=True):
            row[: len(hidden[i])] = hidden[i]
        for at in range(0, len(wanted.tokens), CHUNK):
            rows, positions, tokens = (
                own[at : at + CHUNK] for own in (wanted.rows, wanted.positions, wanted.tokens)
            )
            part, logits = replace(wanted, rows=rows, positions=positions, tokens=tokens), []
            for inputs in (LayerInputs({after: intact}, found.as_tuple), found):
                with entered_at(decoder, after, inputs):
                    logits.append(target_logits(decoder, batch, part))
            nats.append(divergence(logits[0], torch.arange(len(rows)), logits[1]))
        return [float(value) for value in by_row(torch.cat(nats), wanted)]


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


def _pieces(decoder: Decoder, text: Text, task: str, on_progress: Progress) -> list[dict[str, list[int]]]:
    """Return the pieces of a text: their `tokens`, and the places in them that were `given`."""
    rows: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):  # absent or damaged
        rows = read_rows(text.path)
    names = [str(number) for number in range(len(text.uniforms()))]
    if len(rows) < len(names):
        if fingerprint(decoder.model) != text.model:
            raise _lacking(decoder, text, task)
        with contextlib.closing(_opened(text)) as book:
            _fill(decoder, text, book, on_progress)
            rows = book.rows
    return [rows[name] for name in names]


def _opened(text: Text) -> Ledger:
    """Return the ledger of a text, waited for where another run writes it, and begun anew where it is damaged."""
    identity = {**asdict(text), "version": VERSION}
    try:
        return Ledger(text.path, identity, wait=True).__enter__()
    except CheckpointError as error:
        if text.path.exists():
            warnings.warn(f"{error}; it is written anew", stacklevel=2)
            text.path.unlink()
        return Ledger(text.path, identity, wait=True).__enter__()


def _fill(decoder: Decoder, text: Text, book: Ledger, on_progress: Progress) -> None:
    """Write the pieces that are missing, some at a time."""
    uniforms, at_once = text.uniforms(), AtOnce()
    missing = [number for number in range(len(uniforms)) if str(number) not in book.rows]
    for first in range(0, len(missing), BATCH):
        some = missing[first : first + BATCH]

        def pieces(rows: list[int], numbers: list[int] = some) -> list[Piece]:
            before = (len(book.rows) + rows[0]) * text.piece

            def step(done: int) -> None:
                on_progress(before + done * len(rows), uniforms.numel())

            return write(decoder, uniforms[[numbers[row] for row in rows]], step)

        found = itertools.chain(*at_once(len(some), text.piece, pieces))
        for number, (tokens, given) in zip(some, found, strict=True):
            size = min(text.piece, text.tokens - number * text.piece)
            book.append(str(number), {"tokens": tokens[:size], "given": [at for at in given if at < size]})


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


def _lacking(decoder: Decoder, text: Text, task: str) -> DataError:
    """Return the error for what only the intact model can put into the cache."""
    name = (decoder.base or {"name": decoder.name})["name"]
    return DataError(
        f"{task}: what the intact model writes is not in the cache, and {decoder.name} is not intact: "
        f"`causalprune evaluate {name} --on {task} --seed {text.seed} -o intact.json` puts it there"
    )
