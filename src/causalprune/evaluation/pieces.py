"""The pieces of a text that the intact model writes: kept as they are written, and written again where they are of no use."""

import contextlib
import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.core import (
    AtOnce,
    CheckpointError,
    DataError,
    Decoder,
    Ledger,
    Progress,
    cache_folder,
    read_rows,
)
from causalprune.evaluation.sampling import Piece, write
from causalprune.models import fingerprint

TRIES, DISTINCT, GIVEN = 3, 0.05, 0.25
"""How often a piece is written until it is of use: with so many different tokens at least, and so many given ones at most, as shares."""
BATCH = 32
"""Pieces that are written at once, at most."""


@dataclass(frozen=True)
class Text:
    """What a text depends on: the fingerprint of the model that writes it, its size, and the seed.

    What is `measured` and what calibrates are drawn by other random numbers, whatever their seeds. The `version` is that of the way
    in which it is written (`version_of`).
    """

    model: str
    use: Literal["measured", "calibration"]
    tokens: int
    piece: int
    seed: int
    version: int = 1

    @property
    def path(self) -> Path:
        """Where its pieces are kept."""
        name = "-".join(map(str, (self.model[:16], *list(asdict(self).values())[1:])))
        return cache_folder() / "own" / f"{name}.ledger"

    def uniforms(self, again: int = 0) -> Float[Tensor, "piece time"]:
        """Return a random number for every token; a shorter text has the first ones of a longer one.

        Pieces that are written `again` have others.
        """
        name = f"{self.use}:{self.seed}:{again}" if again else f"{self.use}:{self.seed}"
        seed = hashlib.sha256(name.encode()).digest()
        shape = math.ceil(self.tokens / self.piece), self.piece
        return torch.from_numpy(np.random.default_rng([*seed]).random(shape, dtype=np.float32))


def version_of(decoder: Decoder) -> int:
    """Return the version of the way in which a model writes: 1, or 2 where other mixers than attention have states, which version 1 kept."""
    return 2 if any(layer.mixer("mixers") for layer in decoder.layers) else 1


def pieces_of(
    decoder: Decoder, text: Text, task: str, on_progress: Progress, beside: Sequence[Text] = ()
) -> list[dict[str, list[int]]]:
    """Return the pieces of a text: their `tokens`, and the places in them that were `given`."""
    rows: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):  # absent or damaged
        rows = read_rows(text.path)
    names = [str(number) for number in range(len(text.uniforms()))]
    if len(rows) < len(names):
        if fingerprint(decoder.model) != text.model:
            raise lacking(decoder, text, task)
        every = {text, *(own for own in beside if (own.model, own.piece) == (text.model, text.piece))}
        with contextlib.ExitStack() as stack:
            ordered = sorted(every, key=lambda own: own.path)  # as any other run waits for them
            books = {own: stack.enter_context(contextlib.closing(_opened(own))) for own in ordered}
            _fill(decoder, books, on_progress)
            rows = books[text].rows
    return [rows[name] for name in names]


def _opened(text: Text) -> Ledger:
    """Return the ledger of a text, waited for where another run writes it, and begun anew where it is damaged."""
    identity = asdict(text)
    try:
        return Ledger(text.path, identity, wait=True).__enter__()
    except CheckpointError as error:
        if text.path.exists():
            warnings.warn(f"{error}; it is written anew", stacklevel=2)
            text.path.unlink()
        return Ledger(text.path, identity, wait=True).__enter__()


def _fill(decoder: Decoder, books: Mapping[Text, Ledger], on_progress: Progress) -> None:
    """Write the pieces that are missing of texts with pieces of one size, some at a time."""
    every = [(text, number) for text in books for number in range(len(text.uniforms()))]
    missing = [(text, number) for text, number in every if str(number) not in books[text].rows]
    size, at_once = missing[0][0].piece if missing else 0, AtOnce()
    for first in range(0, len(missing), BATCH):
        some, there = missing[first : first + BATCH], len(every) - len(missing) + first

        def told(done: int, there: int = there) -> None:
            on_progress(there * size + done, len(every) * size)

        for (text, number), (tokens, given) in zip(some, _tried(decoder, some, at_once, told), strict=True):
            end = min(text.piece, text.tokens - number * text.piece)
            own = {"tokens": tokens[:end], "given": [at for at in given if at < end]}
            books[text].append(str(number), own)


def _tried(
    decoder: Decoder, wanted: Sequence[tuple[Text, int]], at_once: AtOnce, told: Callable[[int], None]
) -> list[Piece]:
    """Return pieces of texts by their numbers; those that are of no use are written again with other random numbers.

    Raises:
        DataError: some are of no use `TRIES` times.
    """
    found: dict[int, Piece] = {}
    for again in range(TRIES):
        left = [i for i in range(len(wanted)) if i not in found or useless(found[i])]
        uniforms = {text: text.uniforms(again) for text, _ in wanted}

        def pieces(
            rows: list[int],
            left: list[int] = left,
            drawn: Mapping[Text, Tensor] = uniforms,
            again: int = again,
        ) -> list[Piece]:
            own = [drawn[text][number] for text, number in (wanted[left[row]] for row in rows)]
            size = own[0].shape[0]
            step = (lambda _: None) if again else (lambda done: told(rows[0] * size + done * len(rows)))
            return write(decoder, torch.stack(own), step)

        if left and again:
            warnings.warn(
                f"{len(left)} of {len(wanted)} pieces of the model's own text repeat themselves or end at once: written again",
                stacklevel=2,
            )
        if left:
            made = itertools.chain(*at_once(len(left), wanted[0][0].piece, pieces))
            found |= zip(left, made, strict=True)
    if bad := [i for i in found if useless(found[i])]:
        raise DataError(
            f"{decoder.name} writes text that repeats itself or ends at once: {len(bad)} of {len(wanted)} pieces, {TRIES} times "
            f"each, as {decoder.tokenizer.decode(found[bad[0]][0][:24])!r}: take other text (--preserve c4, or none; of a recipe "
            "general_text: none)"
        )
    return [found[i] for i in range(len(wanted))]


def useless(piece: Piece) -> bool:
    """Tell whether a piece repeats itself, with hardly any tokens of its own, or is of documents that end at once."""
    tokens, given = piece
    return len(set(tokens)) < DISTINCT * len(tokens) or len(given) > GIVEN * len(tokens)


def lacking(decoder: Decoder, text: Text, task: str) -> DataError:
    """Return the error for what only the intact model can put into the cache."""
    name = (decoder.base or {"name": decoder.name})["name"]
    return DataError(
        f"{task}: what the intact model writes is not in the cache, and {decoder.name} is not intact: "
        f"`causalprune evaluate {name} --on {task} --seed {text.seed} -o intact.json` puts it there"
    )
