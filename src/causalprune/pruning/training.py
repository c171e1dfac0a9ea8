"""The last update: kept weights of all layers together follow the intact model's predictions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import psutil
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune.calibration import batches
from causalprune.core import Batch, Decoder, Example, OptionError, Progress, State, silent
from causalprune.interventions import (
    LayerInputs,
    divergence_slope,
    entered_at,
    last_hidden,
    residual,
    run_until,
    target_logits,
    targets,
)

TOKENS, FEWEST, MOST = 54_000, 2, 6
"""Training goes through all examples until it has seen so many tokens, between so few and so many times. More brought little (docs/log.md)."""
RATE = 5e-4
"""Largest step of the optimizer, in root mean squares of a matrix's kept weights, which differ tenfold among models."""
WARM_UP = 0.1
"""Share of the steps in which the rate rises; then it falls along half a cosine to zero."""
BETAS = (0.9, 0.95)
BATCH_TOKENS = 1024
"""Tokens of one step: small batches, as a few dozen problems have to give some dozens of steps."""
SCALE = 1024.0
"""Slopes are multiplied by this on their way back and gradients divided by it: a mean over many tokens is too small for float16."""
CHUNK = 256
"""Positions whose logits exist at once: bounds the memory that large vocabularies take."""

Lesson: TypeAlias = tuple[Batch, LayerInputs]
"""A batch, and the `last_hidden` of the intact model for it: what training follows."""


def lessons(
    decoder: Decoder,
    examples: Sequence[Example],
    max_batch_tokens: int,
    state: State | None = None,
    on_progress: Progress = silent,
) -> list[Lesson]:
    """Return what training will follow, from a model that is still intact, or from the `state` of a stopped run.

    Raises:
        OptionError: a device has not the memory that training takes.
    """
    check_memory(decoder)  # before anything that takes time
    steps, state = batches(examples, max_batch_tokens=min(BATCH_TOKENS, max_batch_tokens)), state or State()
    known = state.values.pop("lessons", {"hidden": [], "as_tuple": False})
    after, device = len(decoder.layers), decoder.projections[-1].device
    hidden = [own.to(device, copy=True) for own in known["hidden"]]  # out of the file
    found = [LayerInputs({after: own}, known["as_tuple"]) for own in hidden]
    on_progress(len(found), len(steps))
    for batch in steps[len(found) :]:
        found.append(last_hidden(decoder, batch))
        if state.due() or len(found) == len(steps):
            every = [own.hidden[after] for own in found]
            own = {"hidden": every, "as_tuple": found[0].as_tuple, "batches": len(steps)}
            state.flush(lessons=own)
        on_progress(len(found), len(steps))
    return list(zip(steps, found, strict=True))


def epochs(tokens: int) -> int:
    """Return how often training goes through examples that have so many tokens."""
    return min(MOST, max(FEWEST, math.ceil(TOKENS / max(tokens, 1))))


def rounds(followed: Sequence[Lesson]) -> int:
    """Return how often training goes through these lessons."""
    return epochs(sum(int(batch.lengths.sum()) for batch, _ in followed))


def distill(
    decoder: Decoder,
    keep: Mapping[str, Bool[Tensor, "out in"]],
    followed: Sequence[Lesson],
    *,
    seed: int,
    on_step: Progress,
    state: State | None = None,
) -> None:
    """Train the kept weights of all projections, in place, to predict every token as the intact model did.

    Minimises the mean divergence KL(intact ‖ pruned) over all positions, prompts included, by Adam, `rounds` times over
    the batches that are `followed`. What is zero stays zero. Goes on from the `state` of a stopped run, step by step. Holds
    `memory_bytes` beside the model; each epoch costs about three forward passes.
    """
    masks, state = _masks(decoder, keep), state or State()
    parameters = list(masks)
    if trained := state.values.pop("trained", None):
        for parameter, weight in zip(parameters, trained, strict=True):
            parameter.data.copy_(weight)
        return
    masters = [parameter.detach().float() for parameter in parameters]  # float32 parameters are their own
    scales = [_root_mean_square(m, masks[p]) for p, m in zip(parameters, masters, strict=True)]
    optimizer = torch.optim.Adam([{"params": [master]} for master in masters], betas=BETAS)
    first, last, generator = 0, rounds(followed), torch.Generator().manual_seed(seed)
    own: dict[str, Any] = {"steps": 0, "batches": len(followed)}
    if begun := state.values.pop("training", None):
        first, last, scales = begun["epoch"], begun["epochs"], begun["scales"]
        own["steps"] = begun.get("steps", 0)  # earlier releases kept whole epochs
        generator.set_state(begun["generator"])
        optimizer.load_state_dict(begun["optimizer"])
        for parameter, master, weight in zip(parameters, masters, begun["masters"], strict=True):
            parameter.data.copy_(master.copy_(weight))
    total = last * len(followed)
    on_step(first * len(followed) + own["steps"], total)
    with _learning(decoder, parameters):
        for epoch in range(first, last):
            own |= {"epoch": epoch, "epochs": last, "scales": scales, "generator": generator.get_state()}
            order = torch.randperm(len(followed), generator=generator).tolist()
            for number in order[own["steps"] :]:
                done = epoch * len(followed) + own["steps"]
                for group, scale in zip(optimizer.param_groups, scales, strict=True):
                    group["lr"] = RATE * scale * _rate(done / total, total)
                _step(decoder, followed[number], masks, masters, optimizer)
                own["steps"] += 1
                if state.due():
                    state.flush(training={**own, "masters": masters, "optimizer": optimizer.state_dict()})
                on_step(done + 1, total)
            own["steps"] = 0
        state.flush(trained=[parameter.data for parameter in parameters])


@contextmanager
def _learning(decoder: Decoder, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these parameters have gradients, and no others."""
    before, chosen = {p: p.requires_grad for p in decoder.model.parameters()}, set(parameters)
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, own in before.items():
            parameter.requires_grad_(own)


def _step(
    decoder: Decoder,
    lesson: Lesson,
    masks: Mapping[nn.Parameter, Tensor],
    masters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Move the masters by the gradients of a batch, and the parameters with them."""
    gradients = _gradients(decoder, *lesson, list(masks))
    for mask, master, gradient in zip(masks.values(), masters, gradients, strict=True):
        if gradient is not None:  # None: an expert stack that no token reached
            master.grad = gradient.float() * mask / SCALE
    optimizer.step()
    optimizer.zero_grad()  # no memory beside the next gradients, nor a step for experts that no token reaches
    with torch.no_grad():
        for parameter, master in zip(masks, masters, strict=True):
            parameter.copy_(master)


def memory_bytes(decoder: Decoder) -> dict[torch.device, int]:
    """Return what `distill` holds beside the model and its activations, by device.

    Gradients, masks and two moments, and float32 copies of weights of another dtype.
    """
    found: dict[torch.device, int] = {}
    for parameter in {p.parameter for p in decoder.projections}:
        each = 12 + 2 * parameter.element_size() + (0 if parameter.dtype == torch.float32 else 4)
        found[parameter.device] = found.get(parameter.device, 0) + each * parameter.numel()
    return found


def check_memory(decoder: Decoder) -> None:
    """Raise `OptionError` where a device has not the memory that `distill` will hold, before anything is changed."""
    for device, needed in memory_bytes(decoder).items():
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what earlier work has left there counts as free
            free = torch.cuda.mem_get_info(device)[0]
        elif device.type == "cpu":
            free = psutil.virtual_memory().available
        else:
            continue
        if needed > free:
            raise OptionError(
                f"training the kept weights of {decoder.name} takes {needed / 2**30:.1f} GiB on {device} beside the model, "
                f"and {free / 2**30:.1f} GiB are free: choose another update, as in causal+refit"
            )


def _root_mean_square(weight: Tensor, mask: Tensor) -> float:
    kept = float(mask.count_nonzero())  # a sum would overflow in float16
    return math.sqrt(float((weight * mask).square().sum()) / max(kept, 1.0))


def _rate(part: float, total: int) -> float:
    """Return the share of the largest learning rate when a part of the steps is done."""
    return min(1.0, (part + 1 / total) / WARM_UP) * (1 + math.cos(math.pi * part)) / 2


def _gradients(
    decoder: Decoder, batch: Batch, intact: LayerInputs, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    """Return `SCALE` times the gradients of the mean divergence over all positions of a batch.

    Back to the last layer's output some positions at a time, from there through all layers at once.
    """
    after, wanted = len(decoder.layers), targets(replace(batch, is_target=batch.real))
    with torch.enable_grad():
        hidden = residual(run_until(decoder, batch.tokens, after - 1))
    leaf = hidden.detach().requires_grad_()
    for at in range(0, len(wanted.tokens), CHUNK):
        own = slice(at, at + CHUNK)
        part = replace(
            wanted, rows=wanted.rows[own], positions=wanted.positions[own], tokens=wanted.tokens[own]
        )
        with torch.no_grad(), entered_at(decoder, after, intact):
            teacher = target_logits(decoder, batch, part)
        with torch.enable_grad(), entered_at(decoder, after, LayerInputs({after: leaf}, intact.as_tuple)):
            logits = target_logits(decoder, batch, part)
        slope = divergence_slope(teacher, logits.detach(), SCALE / len(wanted.tokens))
        logits.backward(slope, inputs=[leaf])
    return torch.autograd.grad(hidden, parameters, leaf.grad, allow_unused=True)


def _masks(decoder: Decoder, keep: Mapping[str, Tensor]) -> dict[nn.Parameter, Float[Tensor, "..."]]:
    """Return what stays of every stored parameter that holds projections, as `keep` says of its views."""
    masks: dict[nn.Parameter, nn.Parameter] = {}
    for p in decoder.projections:
        if p.parameter not in masks:
            masks[p.parameter] = nn.Parameter(torch.zeros_like(p.parameter), requires_grad=False)
        replace(p, parameter=masks[p.parameter]).write(keep[p.name].to(p.parameter.dtype))
    return dict(masks)
