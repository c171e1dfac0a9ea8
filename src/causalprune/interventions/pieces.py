"""Forward passes that can be gone back through a layer at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from causalprune.core import Batch, Decoder, Layer, free_bytes
from causalprune.interventions.ablation import LayerInputs, capture, entered_at, residual, run_until
from causalprune.interventions.carried import Handed, Handing

Watch: TypeAlias = Callable[[Layer, Batch], AbstractContextManager[Any]]
Hold: TypeAlias = Callable[[LayerInputs], LayerInputs]
Told: TypeAlias = Callable[[], None]
Slopes: TypeAlias = Sequence[Float[Tensor, "*stream _ _ model"]]
SHARE = 0.5
"""Of the memory that is free, for activations of a pass."""


def as_they_are(inputs: LayerInputs) -> LayerInputs:
    """Hold inputs of layers where they are (a `Hold`)."""
    return inputs


class Pieces:
    """The layers' inputs in passes of some batches, and what slopes at a layer's output make of its weights and its input.

    A layer sees all batches before the next one runs, forward and back. Where they fit, activations are held; where not, each
    layer runs again on the way back, with the same bits. `last` is what the last layer sends to the final norm; `watch` opens
    what is to be open while a layer runs; `hold` keeps inputs of layers somewhere, and `told` hears of every layer that has
    run. Costs a forward pass, and then two or three more.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: Sequence[Batch],
        watch: Watch = lambda *_: nullcontext(),
        *,
        hold: Hold = as_they_are,
        told: Told = lambda: None,
    ) -> None:
        self._decoder, self._batches, self._watch, self._told = decoder, batches, watch, told
        self._handing = [Handing(decoder) for _ in batches]
        self._made: list[list[tuple[LayerInputs, _Sent | None]]] = []
        """By layer and batch its input, and what it sends on where the way back from there is held."""
        holds, inputs = not decoder.offloaded, list(entering(decoder, batches, hold))
        room, held = SHARE * free_bytes(decoder.device), 0
        for layer in decoder.layers:
            made: list[tuple[LayerInputs, _Sent | None]] = []
            for number, own in enumerate(inputs):
                leaf = own.hidden[layer.index].detach().requires_grad_()
                with torch.set_grad_enabled(holds), _counted(layer.module) as saved:
                    sent = self._run(layer, number, leaf, own.as_tuple)
                self._handing[number].take(sent.handed)
                made.append((own, sent if holds else None))
                left = (len(decoder.layers) - layer.index) * len(batches) - number - 1
                held += sum(saved)
                holds = holds and held + sum(saved) * left < room
                inputs[number] = hold(LayerInputs({layer.index + 1: sent.output.detach()}, own.as_tuple))
            self._made.append(made)
            told()
        self.last: Sequence[LayerInputs] = inputs

    def back(
        self, layer: int, parameters: Sequence[nn.Parameter], slopes: Slopes
    ) -> tuple[Slopes, list[Tensor | None]]:
        """Return the slopes at the inputs of a layer and at these weights of it, given those at its outputs.

        Those at weights are sums over the batches. Goes through the layers from the last to the first, once.
        """
        found, sums = list[Tensor](), list[Tensor | None]([None] * len(parameters))
        for number, (own, held) in enumerate(self._made.pop()):
            if (sent := held) is None:
                leaf = own.hidden[layer].detach().requires_grad_()
                with torch.enable_grad():
                    sent = self._run(self._decoder.layers[layer], number, leaf, own.as_tuple)
            handing = self._handing[number]
            others, also = handing.back(sent.handed)
            slope, *gradients = torch.autograd.grad(
                [sent.output, *others],
                [sent.leaf, *parameters, *handing.tensors],
                [slopes[number], *also],
                allow_unused=True,
            )
            assert slope is not None
            found.append(slope)
            handing.add(gradients[len(parameters) :])
            sums = [_added(a, b) for a, b in zip(sums, gradients[: len(parameters)], strict=True)]
        self._told()
        return found, sums

    def _run(self, layer: Layer, number: int, leaf: Tensor, as_tuple: int) -> "_Sent":
        own, batch = LayerInputs({layer.index: leaf}, as_tuple), self._batches[number]
        with (
            entered_at(self._decoder, layer.index, own),
            self._watch(layer, batch),
            self._handing[number].through(layer) as handed,
        ):
            output = residual(run_until(self._decoder, batch.tokens, layer.index))
        return _Sent(leaf, output, handed)


@dataclass(frozen=True, eq=False)
class _Sent:
    """What a layer made of its input: its output, and what it hands on beside it."""

    leaf: Tensor
    output: Tensor
    handed: Handed


def entering(decoder: Decoder, batches: Sequence[Batch], hold: Hold = as_they_are) -> Iterator[LayerInputs]:
    """Yield the input of the first layer for every batch."""
    for batch in batches:
        own = capture(decoder, batch.tokens, stop=0)
        yield hold(LayerInputs({0: own.hidden[0].clone()}, own.as_tuple))


@contextmanager
def differentiable(decoder: Decoder, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these parameters have gradients, and no others."""
    before, chosen = {p: p.requires_grad for p in decoder.model.parameters()}, set(parameters)
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, own in before.items():
            parameter.requires_grad_(own)


def _added(total: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the sum of gradients, in float32 where there are two."""
    if total is None or other is None:
        return other if total is None else total
    return total.float().add_(other)


@contextmanager
def _counted(module: nn.Module) -> Iterator[list[int]]:
    """Collect the bytes of what is saved for the way back in the block, weights apart, each storage once."""
    known, sizes = {p.untyped_storage().data_ptr() for p in module.parameters()}, list[int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
