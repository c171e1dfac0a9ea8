"""Gradients of a task at all weights, plain or as relevance goes back."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalprune.core import Batch, Decoder, Progress, silent
from causalprune.interventions.ablation import LayerInputs, entered_at
from causalprune.interventions.losses import cross_entropy, target_logits, targets
from causalprune.interventions.lrp import prominence, ruled
from causalprune.interventions.pieces import Pieces, Slopes, differentiable


def weight_slopes(
    decoder: Decoder, groups: Sequence[Batch], *, relevant: bool = False, on_progress: Progress = silent
) -> dict[nn.Parameter, Float[Tensor, "..."]]:
    """Return the gradient of the batches' target loss at every prunable parameter, summed over targets, in float32.

    With `relevant`, what relevance sends back there from the targets' logits less the mean logit (`lrp`). Costs about three
    forward passes, four where activations do not fit, and holds as much as the prunable weights in float32.
    """
    found: dict[nn.Parameter, Tensor] = {}
    after, own = len(decoder.layers), list(dict.fromkeys(p.parameter for p in decoder.projections))
    chosen = set(own)
    with ruled(decoder) if relevant else nullcontext(), differentiable(decoder, own):
        for number, batch in enumerate(groups):
            pieces, wanted = Pieces(decoder, [batch]), targets(batch)
            (last,) = pieces.last
            leaf = last.hidden[after].clone().requires_grad_()
            with torch.enable_grad(), entered_at(decoder, after, LayerInputs({after: leaf}, last.as_tuple)):
                logits = target_logits(decoder, batch, wanted)
                total = prominence(logits, wanted).sum() if relevant else cross_entropy(logits, wanted).sum()
            slopes: Slopes = torch.autograd.grad(total, [leaf])
            for layer in reversed(decoder.layers):
                parameters = [p for p in layer.module.parameters() if p in chosen]
                slopes, gradients = pieces.back(layer.index, parameters, slopes)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:  # None: an expert that no token reached
                        found[parameter] = found.get(parameter, 0) + gradient.float()
            on_progress(number + 1, len(groups))
    return found
