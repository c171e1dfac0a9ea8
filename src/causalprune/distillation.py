"""The last update: kept weights of all layers together follow the intact model's predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune.ablation import LayerInputs, capture, entered_at, run_layer
from causalprune.losses import divergence, target_logits, targets
from causalprune.types import Batch, Decoder

EPOCHS = 2
LEARNING_RATE = 2e-5
BETAS = (0.9, 0.95)
BATCH_TOKENS = 1024
"""Tokens of one step: small batches, as a few dozen problems have to give some dozens of steps."""


def last_hidden(decoder: Decoder, batch: Batch) -> LayerInputs:
    """Return what the last layer sends to the final norm: all that is needed to make the logits again."""
    last = len(decoder.layers) - 1
    inputs = capture(decoder, batch.tokens, stop=last)
    hidden = run_layer(decoder, batch.tokens, last, inputs)
    return LayerInputs({last + 1: hidden}, inputs.as_tuple)


def distill(
    decoder: Decoder,
    keep: Mapping[str, Bool[Tensor, "out in"]],
    groups: Sequence[Batch],
    intact: Sequence[LayerInputs],
    *,
    seed: int,
    on_step: Callable[[int, int], None],
) -> None:
    """Train the kept weights of all projections, in place, to predict the targets as the intact model did.

    Minimises the mean divergence KL(intact ‖ pruned) at the target positions by Adam, `EPOCHS` times over the
    batches; `intact[i]` is the `last_hidden` of batch i. What is zero stays zero. Holds a float32 copy of the
    prunable weights, their gradients and two moments; each epoch costs three forward passes.
    """
    masks = _masks(decoder, keep)
    parameters = list(masks)
    masters = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(masters, lr=LEARNING_RATE, betas=BETAS)
    generator, after, done = torch.Generator().manual_seed(seed), len(decoder.layers), 0
    frozen = {p: p.requires_grad for p in decoder.model.parameters()}
    try:
        for parameter in frozen:
            parameter.requires_grad_(parameter in masks)
        for _ in range(EPOCHS):
            for number in torch.randperm(len(groups), generator=generator).tolist():
                batch, wanted = groups[number], targets(groups[number])
                with torch.no_grad(), entered_at(decoder, after, intact[number]):
                    teacher = target_logits(decoder, batch, wanted)
                with torch.enable_grad():
                    logits = target_logits(decoder, batch, wanted)
                    loss = divergence(teacher, torch.arange(len(teacher)), logits).mean()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, master, gradient in zip(parameters, masters, gradients, strict=True):
                    if gradient is not None:  # None: an expert stack that no token reached
                        master.grad = gradient.float() * masks[parameter]
                optimizer.step()
                with torch.no_grad():
                    for parameter, master in zip(parameters, masters, strict=True):
                        parameter.copy_(master)
                done += 1
                on_step(done, EPOCHS * len(groups))
    finally:
        for parameter, before in frozen.items():
            parameter.requires_grad_(before)


def _masks(decoder: Decoder, keep: Mapping[str, Tensor]) -> dict[nn.Parameter, Float[Tensor, "..."]]:
    """Return what stays of every stored parameter that holds projections, as `keep` says of its views."""
    masks: dict[nn.Parameter, nn.Parameter] = {}
    for p in decoder.projections:
        if p.parameter not in masks:
            masks[p.parameter] = nn.Parameter(torch.zeros_like(p.parameter), requires_grad=False)
        replace(p, parameter=masks[p.parameter]).write(keep[p.name].to(p.parameter.dtype))
    return dict(masks)
