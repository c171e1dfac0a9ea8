"""What is asked of logits, and its slopes at gates: the logits of some positions exist at a time.

A question gives every prediction a number to be differentiated: a log-probability, log-odds, or the chance of a label that
is drawn. So a window of a thousand tokens costs no more memory for a large vocabulary than a short problem does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.core import Batch, Decoder
from causalprune.interventions.ablation import (
    LayerInputs,
    entered_at,
    gated,
    recomputed,
    residual,
    run_until,
    values_of,
)
from causalprune.interventions.gradients import by_unit, gates_at, labels_of
from causalprune.interventions.losses import (
    Targets,
    by_row,
    cross_entropy,
    divergence,
    divergence_slope,
    lost,
    other_targets,
    parts_of,
    target_logits,
    targets,
)
from causalprune.interventions.lrp import prominence as prominence_of
from causalprune.interventions.units import Parts, Site

Asked: TypeAlias = Callable[[Float[Tensor, "target vocab"], Targets, slice], Float[Tensor, "target"]]
"""From the logits of some predictions, their targets, and their place among all of the batch."""
CHUNK = 256
"""Positions whose logits exist at once."""


def log_odds(logits: Float[Tensor, "target vocab"], wanted: Targets) -> Float[Tensor, "target"]:
    """Return ln p − ln (1 − p) of each target token: its slope does not vanish where p is near 1, as in a loop."""
    logits, own = logits.float(), wanted.tokens.to(logits.device)[:, None]
    others = logits.scatter(-1, own, -torch.inf).logsumexp(-1)
    return logits.gather(-1, own)[:, 0] - others


def odds(logits: Float[Tensor, "target vocab"], wanted: Targets, at: slice) -> Float[Tensor, "target"]:
    """Ask for log-odds (an `Asked`)."""
    return log_odds(logits, wanted)


def likelihood(logits: Float[Tensor, "target vocab"], wanted: Targets, at: slice) -> Float[Tensor, "target"]:
    """Ask for log-probabilities (an `Asked`)."""
    return -cross_entropy(logits, wanted)


def prominence(logits: Float[Tensor, "target vocab"], wanted: Targets, at: slice) -> Float[Tensor, "target"]:
    """Ask for logits less the mean logit (an `Asked`), from which relevance starts."""
    return prominence_of(logits, wanted)


def drawn(uniforms: Float[Tensor, "target"]) -> Asked:
    """Return what asks for log-probabilities of labels that are drawn from the predictions by these numbers.

    The mean square of its slopes is the Fisher information: twice the divergence to second order.
    """

    def asked(logits: Tensor, wanted: Targets, at: slice) -> Tensor:
        return -cross_entropy(logits, replace(wanted, tokens=labels_of(logits, uniforms[at]).cpu()))

    return asked


class Losing:
    """Asks for the loss (an `Asked`), less that of the batch's `others` where it has them; `nats` adds it up."""

    def __init__(self, batch: Batch) -> None:
        self.nats = torch.zeros(len(batch.tokens), dtype=torch.float64)
        self._others = other_targets(batch)

    def __call__(self, logits: Tensor, wanted: Targets, at: slice) -> Tensor:
        """Return the loss of these targets, less that of the others."""
        others = self._others and replace(wanted, tokens=self._others.tokens[at])
        found = lost(logits, wanted, others)
        self.nats += by_row(found.detach(), wanted).cpu()
        return found


class Following:
    """Asks what has the slopes of the divergence from the intact model (an `Asked`), given what its last layer sent on.

    The divergences themselves, in `nats`, are added up for every sequence.
    """

    def __init__(self, decoder: Decoder, batch: Batch, intact: LayerInputs) -> None:
        self._decoder, self._batch, self._intact = decoder, batch, intact
        self.nats = torch.zeros(len(batch.tokens), dtype=torch.float64)

    def __call__(self, logits: Tensor, wanted: Targets, at: slice) -> Tensor:
        """Return values of these targets, of use for their slopes alone."""
        with torch.no_grad(), entered_at(self._decoder, len(self._decoder.layers), self._intact):
            teacher = target_logits(self._decoder, self._batch, wanted)
        own = logits.detach()
        self.nats += by_row(divergence(teacher, torch.arange(len(own)), own), wanted).cpu()
        return (logits * divergence_slope(teacher, own, 1.0)).sum(-1)


def end_slope(
    decoder: Decoder, batch: Batch, last: LayerInputs, asked: Asked
) -> Float[Tensor, "*stream batch time model"]:
    """Return the slope of what is asked of a batch's targets, summed, at the output of the last layer."""
    after = len(decoder.layers)
    leaf = last.hidden[after].detach().clone().requires_grad_()
    for part, at in parts_of(targets(batch), CHUNK):
        with torch.enable_grad(), entered_at(decoder, after, LayerInputs({after: leaf}, last.as_tuple)):
            total = asked(target_logits(decoder, batch, part), part, at).sum()
        total.backward(inputs=[leaf])
    assert leaf.grad is not None
    return leaf.grad


def gate_slopes(
    decoder: Decoder,
    batch: Batch,
    units: Sequence[Parts],
    asked: Asked,
    *,
    gate: float | Mapping[Site, Tensor] = 1.0,
    instead: Mapping[Site, Tensor] | None = None,
) -> Float[Tensor, "unit batch"]:
    """Return the slopes of what is asked, summed over the targets of each sequence, at the gate of every unit.

    One forward and one backward pass; `gate` and `instead` as in `expansion`.
    """
    gates, after = gates_at(decoder, batch, units, gate), len(decoder.layers)
    with torch.enable_grad(), gated(decoder, gates, instead), recomputed(decoder):
        output = run_until(decoder, batch.tokens, after - 1)
        hidden = residual(output)
        slope = end_slope(decoder, batch, LayerInputs({after: hidden}, values_of(output)), asked)
        axis = 0 if hidden.shape[:2] == batch.tokens.shape else 1
        return by_unit((hidden * slope).movedim(axis, 0).flatten(1).sum(1), gates, units, keep=False)
