"""Stage 1 of the method: how much the loss rises when a head is removed (method §1)."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from causalprune.ablation import LayerInputs, capture, entered_at, masked_heads
from causalprune.anatomy import fingerprint
from causalprune.calibration import batches
from causalprune.errors import ModelError
from causalprune.ledger import Ledger
from causalprune.losses import repeated, target_nats
from causalprune.types import Batch, Calibration, Decoder, Effects, Progress, Unit, silent


def exact(
    decoder: Decoder,
    calibration: Calibration,
    *,
    ledger: Path | None = None,
    max_batch_tokens: int = 2048,
    on_progress: Progress = silent,
) -> Effects:
    """Measure every head of every layer by zeroing it, on every calibration sequence.

    Each masked pass enters the model at the masked layer with the cached input of the intact pass, so
    the cost is about half of `n_layers · n_heads` forward passes, with logits at target positions only.
    With `ledger`, each finished (batch, layer) is on disk before the next begins: a killed run goes on
    where it was and returns the same values bit for bit (same machine, same number of threads).
    """
    groups = batches(calibration.examples, max_batch_tokens=max_batch_tokens)
    identity = {
        "model": fingerprint(decoder.model),  # anew: it may have been pruned since it was loaded
        "calibration": calibration.fingerprint,
        "estimator": "exact",
        "batches": hashlib.sha256(repr([batch.indices for batch in groups]).encode()).hexdigest(),
    }
    n_layers, n_sequences = len(decoder.layers), len(calibration.examples)
    units = tuple(Unit(layer.index, h) for layer in decoder.layers for h in range(layer.attention.n_heads))
    masked = torch.zeros(len(units), n_sequences, dtype=torch.float64)
    intact = torch.zeros(n_sequences, dtype=torch.float64)
    work, total = 0, sum(_work(batch, layer, n_layers) for batch in groups for layer in range(n_layers))
    with nullcontext() if ledger is None else Ledger(ledger, identity) as book:
        for number, batch in enumerate(groups):
            columns = list(batch.indices)
            inputs = cache(partial(capture, decoder, batch.tokens, stop=n_layers - 1))
            nats = _recalled(book, f"{number}:intact", partial(_intact_nats, decoder, batch))
            intact[columns] = torch.tensor(nats, dtype=torch.float64)
            for layer in range(n_layers):
                measure = partial(_masked_nats, decoder, batch, layer, inputs, max_batch_tokens)
                nats = _recalled(book, f"{number}:{layer}", measure)
                rows = [i for i, unit in enumerate(units) if unit.layer == layer]
                masked[torch.tensor(rows)[:, None], columns] = torch.tensor(nats, dtype=torch.float64)
                work += _work(batch, layer, n_layers)
                on_progress(work, total)
    return Effects(
        units=units,
        masked_nats=masked,
        intact_nats=intact,
        tokens=torch.tensor([example.target_tokens for example in calibration.examples]),
        subset=torch.tensor(calibration.subset),
        model_fingerprint=identity["model"],
        calibration_fingerprint=identity["calibration"],
        description={"estimator": "exact", **calibration.description},
    )


def _work(batch: Batch, layer: int, n_layers: int) -> int:
    return batch.tokens.numel() * (n_layers - layer)


def _recalled(book: Ledger | None, key: str, compute: Callable[[], Any]) -> Any:
    if book is not None and key in book.rows:
        return book.rows[key]
    nats = compute()
    if not bool(torch.tensor(nats).isfinite().all()):
        raise ModelError(
            f"a loss is not finite (batch:layer {key}): look for broken weights or use a wider dtype"
        )
    if book is not None:
        book.append(key, nats)
    return nats


def _intact_nats(decoder: Decoder, batch: Batch) -> list[float]:
    return [float(nats) for nats in target_nats(decoder, batch)]


def _masked_nats(
    decoder: Decoder, batch: Batch, layer: int, inputs: Callable[[], LayerInputs], max_batch_tokens: int
) -> list[list[float]]:
    """Return `[head][sequence]` nats with each head of `layer` removed, several heads to a forward pass."""
    n_heads, n_rows = decoder.layers[layer].attention.n_heads, len(batch.indices)
    at_once = max(1, max_batch_tokens // batch.tokens.numel())
    hidden = inputs().hidden[layer]
    nats: list[list[float]] = []
    for heads in torch.arange(n_heads).split(at_once):
        gate = torch.ones(len(heads), n_rows, n_heads)
        gate[torch.arange(len(heads)), :, heads] = 0
        stacked = LayerInputs({layer: hidden.repeat(len(heads), 1, 1)}, inputs().as_tuple)
        with entered_at(decoder, layer, stacked), masked_heads(decoder, {layer: gate.flatten(0, 1)}):
            losses = target_nats(decoder, repeated(batch, len(heads)))
        nats += losses.view(len(heads), n_rows).tolist()
    return nats
