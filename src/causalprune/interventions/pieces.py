"""A forward pass that can be gone back through a layer at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from causalprune.core import Decoder, Layer, free_bytes
from causalprune.interventions.ablation import LayerInputs, capture, entered_at, residual, run_until
from causalprune.interventions.carried import Handed, Handing

Watch: TypeAlias = Callable[[Layer], AbstractContextManager[Any]]
SHARE = 0.5
"""Of the memory that is free, for activations of a pass."""


class Pieces:
    """The layers' inputs in a pass, and what slopes at a layer's output make of its weights and its input.

    Where they fit, activations are held; where not, each layer runs again on the way back, with the same bits. `last` is
    what the last layer sends to the final norm; `watch` opens what is to be open while a layer runs. Costs a forward pass,
    and then two or three more.
    """

    def __init__(
        self, decoder: Decoder, tokens: Int[Tensor, "batch time"], watch: Watch = lambda _: nullcontext()
    ) -> None:
        first = capture(decoder, tokens, stop=0)
        self._handing = Handing(decoder)
        self._decoder, self._tokens, self._watch, self.as_tuple = decoder, tokens, watch, first.as_tuple
        self._made: list[tuple[Tensor, tuple[Tensor, Handed] | None]] = []
        """Input of every layer, and what it sends on where the way back from there is held."""
        hidden, holds = first.hidden[0].clone(), not decoder.offloaded
        for layer in decoder.layers:
            leaf = hidden.detach().requires_grad_()
            with torch.set_grad_enabled(holds), _counted(layer.module) as saved:
                output, handed = self._run(layer, leaf)
            hidden = output.detach()
            self._handing.take(handed)
            self._made.append((leaf, (output, handed) if holds else None))
            holds = holds and sum(saved) * (len(decoder.layers) - layer.index) < SHARE * free_bytes(
                hidden.device
            )
        self.last: Float[Tensor, "*stream batch time model"] = hidden

    def back(
        self, layer: int, parameters: Sequence[nn.Parameter], slope: Float[Tensor, "*stream batch time model"]
    ) -> tuple[Float[Tensor, "*stream batch time model"], list[Tensor | None]]:
        """Return the slopes at the input of a layer and at these weights of it, given that at its output.

        Goes through the layers from the last to the first, once.
        """
        leaf, sent = self._made.pop()
        if sent is None:
            with torch.enable_grad():
                sent = self._run(self._decoder.layers[layer], leaf)
        output, (others, slopes) = sent[0], self._handing.back(sent[1])
        inputs = [leaf, *parameters, *self._handing.tensors]
        found = torch.autograd.grad([output, *others], inputs, [slope, *slopes], allow_unused=True)
        assert found[0] is not None
        self._handing.add(found[1 + len(parameters) :])
        return found[0], list(found[1 : 1 + len(parameters)])

    def _run(self, layer: Layer, leaf: Tensor) -> tuple[Tensor, Handed]:
        own = LayerInputs({layer.index: leaf}, self.as_tuple)
        with (
            entered_at(self._decoder, layer.index, own),
            self._watch(layer),
            self._handing.through(layer) as handed,
        ):
            output = residual(run_until(self._decoder, self._tokens, layer.index))
        return output, handed


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
