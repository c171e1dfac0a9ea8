"""Gradients of the target loss at the outputs of every projection, one layer in memory at a time.

The rise of the loss when a weight w goes is, to second order, `½ w² F`, F the diagonal of the Fisher
information: `F_ij = Σ_t g_ti² x_tj²` over tokens t, x the input of the matrix, g the gradient of the
loss at its output (LeCun et al. 1989; empirical Fisher with the targets' own labels, or labels drawn from the
model's predictions, which makes it the curvature of the KL divergence from the intact model).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.ablation import LayerInputs, capture, entered_at, run_layer
from causalprune.gradients import labels
from causalprune.losses import Targets, cross_entropy, target_logits, targets
from causalprune.statistics import observed, where
from causalprune.types import Batch, Decoder, Projection

Receive = Callable[[Projection, Float[Tensor, "token in"], Float[Tensor, "token out"]], None]


def output_gradients(
    decoder: Decoder, batch: Batch, receive: Receive, uniforms: Float[Tensor, "target"] | None = None
) -> None:
    """Call `receive` with inputs and output gradients of every projection, the last layer first.

    The loss is the cross-entropy of the targets, or of labels that `uniforms` draw from the predictions, summed. Keeps
    the inputs of all layers and the graph of one; costs two forward passes and one backward.
    """
    last, wanted = len(decoder.layers) - 1, targets(batch)
    inputs = capture(decoder, batch.tokens, stop=last)
    gradient: Tensor | None = None
    for layer in reversed(decoder.layers):
        hidden = inputs.hidden[layer.index].clone().requires_grad_(True)  # a clone left inference mode
        own = LayerInputs({layer.index: hidden}, inputs.as_tuple)

        def see(p: Projection, x: Tensor, y: Tensor, real: Tensor) -> None:
            x = where(x.detach(), real)
            y.register_hook(lambda g: receive(p, x, where(g, real)))

        with torch.enable_grad(), observed(layer, batch.real, see):
            if gradient is not None:
                output = run_layer(decoder, batch.tokens, layer.index, own, differentiable=True)
            else:
                with entered_at(decoder, layer.index, own):
                    logits = target_logits(decoder, batch, wanted)
                drawn = wanted.tokens if uniforms is None else labels(logits, uniforms)
                chosen = Targets(wanted.rows, wanted.positions, drawn, wanted.n_rows, wanted.n_positions)
                output = cross_entropy(logits, chosen).sum()
            (gradient,) = torch.autograd.grad(output, hidden, gradient)
