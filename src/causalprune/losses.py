"""Cross-entropy of target tokens, in nats, per sequence.

Logits are computed at the positions that predict a target token and nowhere else: with large
vocabularies they would otherwise cost more than the decoder (SmolLM2: a quarter of a forward pass).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalprune.types import Batch, Decoder

CHUNK = 256
"""Positions whose softmax is normalised at once: bounds the temporary memory."""


def target_nats(decoder: Decoder, batch: Batch) -> Float[Tensor, "batch"]:
    """Return the cross-entropy summed over each sequence's target tokens, in float64 nats, on the CPU.

    One forward pass. The log-softmax runs in float32 whatever the dtype of the model.
    """
    rows, positions = target_positions(batch)
    with torch.inference_mode(), _head_at(decoder, rows, positions):
        output = decoder.model(input_ids=batch.tokens.to(decoder.device), use_cache=False)
        logits = output.logits[0]
        targets = batch.tokens[rows, positions + 1].to(logits.device)
        normaliser = torch.cat([part.float().logsumexp(-1) for part in logits.split(CHUNK)])
        nats = normaliser - logits.gather(-1, targets[:, None])[:, 0].float()
    counts = (batch.lengths - batch.target_starts).tolist()
    return torch.stack([part.sum() for part in nats.cpu().double().split(counts)])


def target_positions(batch: Batch) -> tuple[Int[Tensor, "target"], Int[Tensor, "target"]]:
    """Return row and position of every prediction of a target token (the position before the token)."""
    time = torch.arange(batch.tokens.shape[1])
    predicts = (time >= batch.target_starts[:, None] - 1) & (time < batch.lengths[:, None] - 1)
    rows, positions = predicts.nonzero(as_tuple=True)
    return rows, positions


def repeated(batch: Batch, times: int) -> Batch:
    """Return the batch `times` over, as rows of one larger batch."""
    return replace(
        batch,
        tokens=batch.tokens.repeat(times, 1),
        lengths=batch.lengths.repeat(times),
        target_starts=batch.target_starts.repeat(times),
        indices=batch.indices * times,
    )


@contextmanager
def _head_at(decoder: Decoder, rows: Tensor, positions: Tensor) -> Iterator[None]:
    def select(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), positions.to(hidden.device)][None], *args[1:])

    handle = decoder.model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
