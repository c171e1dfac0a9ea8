"""Gradients of a task at all weights, plain or as relevance goes back."""

from collections.abc import Sequence
from contextlib import nullcontext

from jaxtyping import Float
from torch import Tensor, nn

from causalprune.core import Batch, Decoder, Progress, silent
from causalprune.interventions.asked import Asked, end_slope
from causalprune.interventions.gradients import last_slope
from causalprune.interventions.losses import cross_entropy
from causalprune.interventions.lrp import prominence, ruled
from causalprune.interventions.pieces import Pieces, Slopes, differentiable


def weight_slopes(
    decoder: Decoder,
    groups: Sequence[Batch],
    *,
    relevant: bool = False,
    asked: Asked | None = None,
    on_progress: Progress = silent,
) -> dict[nn.Parameter, Float[Tensor, "..."]]:
    """Return the gradient of the batches' target loss at every prunable parameter, summed over targets, in float32.

    With `relevant`, what relevance sends back there from the targets' logits less the mean logit (`lrp`); or the gradient of
    what is `asked` instead. Costs about three forward passes, four where activations do not fit, and holds as much as the prunable weights in float32.
    """
    found: dict[nn.Parameter, Tensor] = {}
    own = list(dict.fromkeys(p.parameter for p in decoder.projections))
    chosen, value = set(own), prominence if relevant else cross_entropy
    with ruled(decoder) if relevant else nullcontext(), differentiable(decoder, own):
        for number, batch in enumerate(groups):
            pieces = Pieces(decoder, [batch])
            last = pieces.last[0]
            slope = (
                end_slope(decoder, batch, last, asked) if asked else last_slope(decoder, batch, last, value)
            )
            slopes: Slopes = [slope]
            for layer in reversed(decoder.layers):
                parameters = [p for p in layer.module.parameters() if p in chosen]
                slopes, gradients = pieces.back(layer.index, parameters, slopes)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:  # None: an expert that no token reached
                        found[parameter] = found.get(parameter, 0) + gradient.float()
            on_progress(number + 1, len(groups))
    return found
