"""Losses of target tokens, in nats: cross-entropy, and divergence from the intact model.

Logits are computed at the positions that predict a target token and nowhere else: with large
vocabularies they would otherwise cost more than the decoder (SmolLM2: a quarter of a forward pass).
Softmax and sums run in float32 or wider, whatever the dtype of the model, on the device of the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalprune.core import Batch, Decoder
from causalprune.interventions.ablation import entered_at, last_hidden

CHUNK = 256
"""Positions whose softmax is normalised at once, at most: bounds the temporary memory."""
ROOM = 2**30
"""Bytes of logits, in float32, that may exist at once."""
CACHED = 2**20
"""Logits that a processor works on at once: they stay in its cache, which is several times faster."""
FAR = 20.0
"""Above this rise of a log-probability the divergence is summed in its plain form (expm1 would overflow)."""


@dataclass(frozen=True, eq=False)
class Targets:
    """The target tokens of a batch, and row and position of each prediction (the position before it)."""

    rows: Int[Tensor, "target"]
    positions: Int[Tensor, "target"]
    tokens: Int[Tensor, "target"]
    n_rows: int
    n_positions: int


def targets(batch: Batch) -> Targets:
    """Return the targets of a batch, row by row."""
    rows, positions = target_positions(batch)
    return Targets(rows, positions, batch.tokens[rows, positions + 1], *batch.tokens.shape)


def other_targets(batch: Batch) -> Targets | None:
    """Return the targets that those of a batch are compared with, where there are such."""
    return None if batch.others is None else targets(replace(batch, tokens=batch.others))


def lost(
    logits: Float[Tensor, "target vocab"], wanted: Targets, others: Targets | None
) -> Float[Tensor, "target"]:
    """Return the cross-entropy of each target token, less that of the `others` where there are such."""
    own = cross_entropy(logits, wanted)
    return own if others is None else own - cross_entropy(logits, others)


def chunk(logits: Float[Tensor, "target vocab"]) -> int:
    """Return how many positions are normalised at once; what is computed for each does not depend on it."""
    if logits.device.type != "cpu":
        return CHUNK
    return min(CHUNK, max(torch.get_num_threads(), CACHED // logits.shape[1]))


def target_positions(batch: Batch) -> tuple[Int[Tensor, "target"], Int[Tensor, "target"]]:
    """Return row and position of every prediction of a target token (the position before the token)."""
    rows, positions = batch.is_target[:, 1:].nonzero(as_tuple=True)
    return rows, positions


def target_logits(decoder: Decoder, batch: Batch, wanted: Targets) -> Float[Tensor, "target vocab"]:
    """Return the logits of every prediction of a target token. One forward pass."""

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        hidden = args[0]
        return (hidden[wanted.rows.to(hidden.device), wanted.positions.to(hidden.device)][None], *args[1:])

    with decoder.model.get_output_embeddings().register_forward_pre_hook(select):
        output = decoder.model(input_ids=batch.tokens.to(decoder.device), use_cache=False)
    logits: Tensor = output.logits[0]
    return logits


def parts_of(wanted: Targets, size: int = CHUNK) -> Iterator[tuple[Targets, slice]]:
    """Yield the targets of a batch, so many at a time, and their place among all."""
    for start in range(0, len(wanted.tokens), size):
        at = slice(start, start + size)
        rows, positions, tokens = (own[at] for own in (wanted.rows, wanted.positions, wanted.tokens))
        yield replace(wanted, rows=rows, positions=positions, tokens=tokens), at


def target_nats(decoder: Decoder, batch: Batch) -> Float[Tensor, "batch"]:
    """Return the cross-entropy summed over each sequence's target tokens, in float64 nats, on the CPU.

    Where all their logits would take more than `ROOM`, some exist at a time.
    """
    wanted, after = targets(batch), len(decoder.layers)
    width = decoder.model.get_output_embeddings().weight.shape[0] * 4
    with torch.inference_mode():
        if len(wanted.tokens) * width <= ROOM:
            return by_row(cross_entropy(target_logits(decoder, batch, wanted), wanted), wanted).cpu()
        last, step, found = last_hidden(decoder, batch), max(ROOM // (4 * width), 1), list[Tensor]()
        for part, _ in parts_of(wanted, step):
            with entered_at(decoder, after, last):
                found.append(cross_entropy(target_logits(decoder, batch, part), part))
        return by_row(torch.cat(found), wanted).cpu()


def cross_entropy(logits: Float[Tensor, "target vocab"], wanted: Targets) -> Float[Tensor, "target"]:
    """Return the cross-entropy of each target token, in nats."""
    normaliser = torch.cat([part.float().logsumexp(-1) for part in logits.split(chunk(logits))])
    return normaliser - logits.gather(-1, wanted.tokens.to(logits.device)[:, None])[:, 0].float()


def divergence(
    intact: Float[Tensor, "intact vocab"], at: Int[Tensor, "target"], logits: Float[Tensor, "target vocab"]
) -> Float[Tensor, "target"]:
    """Return KL(intact ‖ masked) of each prediction, in nats, against row `at` of the intact logits.

    Summed as `Σ p · (e^d − 1 − d)`, `d = ln q − ln p`: every term is positive, so that small divergences
    keep their digits and none is negative. It is the KL divergence because `Σ (q − p) = 0`. Not differentiable:
    see `divergence_slope`.
    """
    found, size = [], chunk(logits)
    for start in range(0, len(logits), size):
        q = logits[start : start + size].float().log_softmax(-1)
        p = intact[at[start : start + len(q)].to(intact.device)].to(q.device).float().log_softmax(-1)
        d = q - p
        p.exp_()
        if bool((d < FAR).all()):
            terms = d.expm1().sub_(d).mul_(p)
        else:
            terms = torch.where(d < FAR, p * (d.expm1() - d), q.exp() - p * (1 + d))
        found.append(terms.clamp_min_(0).sum(-1))
    return torch.cat(found)


def divergence_slope(
    intact: Float[Tensor, "target vocab"], logits: Float[Tensor, "target vocab"], weight: float
) -> Float[Tensor, "target vocab"]:
    """Return the gradient of `weight · Σ KL(intact ‖ own)` at its own logits, in their dtype.

    The own probabilities minus the intact ones.
    """
    found, size = torch.empty_like(logits), chunk(logits)
    for part, q, p in zip(found.split(size), logits.split(size), intact.split(size), strict=True):
        part.copy_(q.float().softmax(-1).sub_(p.to(q.device).float().softmax(-1)).mul_(weight))
    return found


def by_row(values: Float[Tensor, "target"], wanted: Targets) -> Float[Tensor, "batch"]:
    """Return the sums over each row's targets, in float64 where the device has it; differentiable."""
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    table = torch.zeros(wanted.n_rows, wanted.n_positions, dtype=wide, device=values.device)
    at = wanted.rows.to(values.device), wanted.positions.to(values.device)
    return table.index_put(at, values.to(wide)).sum(1)  # index_add would not be deterministic on CUDA


def selected(batch: Batch, rows: list[int]) -> Batch:
    """Return these rows of a batch, which may repeat, as a batch."""
    return replace(
        batch,
        tokens=batch.tokens[rows],
        lengths=batch.lengths[rows],
        is_target=batch.is_target[rows],
        indices=tuple(batch.indices[row] for row in rows),
        counterfactual=None if batch.counterfactual is None else batch.counterfactual[rows],
        others=None if batch.others is None else batch.others[rows],
    )
