"""Interventions on a running model: enter it at any layer, leave it after any layer, mask heads.

The model always runs its own `forward`, so attention masks, rotary embeddings, final norm and logit
scaling stay the business of transformers. State changes end with the context managers here.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalprune.types import Decoder


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Residual stream `[batch time model]` at the input of layers, by layer index.

    `as_tuple` tells whether this model's layers return a tuple, which a skipped layer must imitate.
    """

    hidden: Mapping[int, Float[Tensor, "batch time model"]]
    as_tuple: bool


class _LeftModelError(Exception):
    """Carries a layer's output out of a forward pass that needs to go no further."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextmanager
def masked_heads(decoder: Decoder, gates: Mapping[int, Float[Tensor, "batch heads"]]) -> Iterator[None]:
    """Multiply each head's slice of the concatenated head outputs, before `W_o`, by its gate.

    `gates[layer][row, head]` is 0 to remove the head in that row of the batch and 1 to leave it as it is
    (method §1). Rows may differ, so one forward pass can hold many interventions.
    """
    with ExitStack() as stack:
        for index, gate in gates.items():
            attention = decoder.layers[index].attention
            hook = attention.output.register_forward_pre_hook(_gate_hook(gate, attention.head_dim))
            stack.callback(hook.remove)
        yield


def _gate_hook(gate: Tensor, head_dim: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].unflatten(-1, (-1, head_dim))
        return ((heads * gate.to(heads)[:, None, :, None]).flatten(-2), *args[1:])

    return hook


def capture(decoder: Decoder, tokens: Int[Tensor, "batch time"], *, stop: int) -> LayerInputs:
    """Run the model through layer `stop` and keep the input of layers `0 … stop`.

    Costs `(stop + 1) / n_layers` of a forward pass without logits.
    """
    hidden: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as stack:
        for layer in decoder.layers[: stop + 1]:
            handle = layer.module.register_forward_pre_hook(keep(layer.index), with_kwargs=True)
            stack.callback(handle.remove)
        output = _run_until(decoder, tokens, stop)
    return LayerInputs(hidden, as_tuple=isinstance(output, tuple))


@contextmanager
def entered_at(decoder: Decoder, layer: int, inputs: LayerInputs) -> Iterator[None]:
    """Let forward passes skip the layers before `layer`, which then sees `inputs.hidden[layer]`.

    The token ids given to the model need the same batch and time axes as the cached input.
    """
    hidden = inputs.hidden[layer]

    def skip(*args: Any, **kwargs: Any) -> Any:
        return (hidden,) if inputs.as_tuple else hidden

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    with ExitStack() as stack:
        for earlier in decoder.layers[:layer]:
            stack.enter_context(_replaced_forward(earlier.module, skip))
        handle = decoder.layers[layer].module.register_forward_pre_hook(enter, with_kwargs=True)
        stack.callback(handle.remove)
        yield


def run_layer(
    decoder: Decoder, tokens: Int[Tensor, "batch time"], layer: int, inputs: LayerInputs
) -> Float[Tensor, "batch time model"]:
    """Run `layer` alone on `inputs.hidden[layer]` and return its output."""
    with entered_at(decoder, layer, inputs):
        output = _run_until(decoder, tokens, layer)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _run_until(decoder: Decoder, tokens: Tensor, stop: int) -> Any:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _LeftModelError(output)

    handle = decoder.layers[stop].module.register_forward_hook(leave)
    try:
        with torch.inference_mode():
            decoder.model(input_ids=tokens.to(decoder.device), use_cache=False)
    except _LeftModelError as left:
        return left.output
    finally:
        handle.remove()
    raise RuntimeError(f"the forward pass of {decoder.name} never reached {decoder.layers[stop].name}")


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
