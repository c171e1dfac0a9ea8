"""Interventions on a running model: enter it at any layer, leave it after any layer, mask its parts.

The model always runs its own `forward`, so attention masks, rotary embeddings, final norm and logit
scaling stay the business of transformers. State changes end with the context managers here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from causalprune.core import Batch, Decoder, ModelError
from causalprune.interventions.carried import handed_on, kept
from causalprune.interventions.units import Gates, Site, gated_modules, sees_all


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Residual stream `[batch time model]` at the input of layers, by layer index.

    `as_tuple` is how many values this model's layers return as a tuple, which a skipped layer must imitate; 0 for the stream alone.
    """

    hidden: Mapping[int, Float[Tensor, "*stream batch time model"]]
    as_tuple: int

    def rows(self, layer: int, rows: Sequence[int], tokens: Int[Tensor, "batch time"]) -> "LayerInputs":
        """Return the input of a layer in these rows, which may repeat, of the batch with these tokens."""
        hidden = self.hidden[layer]
        axis = 0 if hidden.shape[:2] == tokens.shape else 1  # Gemma 3n has several streams, side by side
        return LayerInputs({layer: hidden[list(rows)] if axis == 0 else hidden[:, list(rows)]}, self.as_tuple)


def on_cpu(inputs: Sequence[LayerInputs], layer: int) -> list[Float[Tensor, "*stream _ _ model"]]:
    """Return what a layer gets in several passes, on the CPU, one after the other."""
    return [own.hidden[layer].cpu() for own in inputs]


class _LeftModelError(Exception):
    """Carries a layer's output out of a forward pass that needs to go no further."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@contextmanager
def gated(
    decoder: Decoder, gates: Gates, instead: Mapping[Site, Float[Tensor, "#batch #time width"]] | None = None
) -> Iterator[None]:
    """Multiply each part's slice of the activations at its site by its gate (method §1).

    For a head that is its slice of the concatenated head outputs, before `W_o`; for a neuron its input to
    the down projection; for an expert its weight in the mixture. Rows may differ, so one forward pass can
    hold many interventions. `instead` holds activations that take the place of what is removed (zero
    without); experts cannot have any.
    """
    with ExitStack() as stack:
        for site, gate in gates.items():
            for module in gated_modules(decoder, site):
                if site.place == "experts" and sees_all(module):
                    handle = module.register_forward_hook(_output_hook(gate))
                elif site.place == "experts":
                    handle = module.register_forward_pre_hook(_routing_hook(gate))
                else:
                    handle = module.register_forward_pre_hook(_gate_hook(gate, (instead or {}).get(site)))
                stack.callback(handle.remove)
        yield


def _gate_hook(gate: Tensor, instead: Tensor | None) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape, n_parts = args[0].shape, gate.shape[1]
        parts = args[0].reshape(len(gate), -1, n_parts, shape[-1] // n_parts)
        factor = gate.to(parts)[:, None, :, None]
        masked = parts * factor
        if instead is not None:
            masked = masked + instead.to(parts).unflatten(-1, (n_parts, -1)) * (1 - factor)
        return (masked.reshape(shape), *args[1:])

    return hook


def _routing_hook(gate: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, chosen, weights = args
        rows = torch.arange(len(gate), device=chosen.device).repeat_interleave(len(chosen) // len(gate))
        return hidden, chosen, weights * gate.to(weights)[rows[:, None], chosen]

    return hook


def _output_hook(gate: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        parts = output.reshape(gate.shape[1], len(gate), -1, output.shape[-1])
        return (parts * gate.to(parts).T[:, :, None, None]).reshape(output.shape)

    return hook


def _chosen(routed: Float[Tensor, "_ model"], n_experts: int) -> Int[Tensor, "token expert"]:
    """Return the experts that every token reaches, `n_experts` in the place of each that it does not."""
    reached = routed.reshape(n_experts, -1, routed.shape[-1]).abs().amax(-1).T > 0
    return torch.where(reached, torch.arange(n_experts, device=routed.device), n_experts)


@contextmanager
def site_inputs(decoder: Decoder, places: Sequence[Site]) -> Iterator[dict[Site, Float[Tensor, "..."]]]:
    """Collect what forward passes in the block send to each site; the last pass wins.

    For experts that is the choice `[token rank]` among them.

    Raises:
        ModelError: a site has its weights in several layers, which get different inputs.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if site.place != "experts":
                seen[site] = args[0]
            else:
                seen[site] = (
                    args[1] if len(args) > 1 else _chosen(args[0], decoder.layers[site.layer].n_experts)
                )

        return hook

    with ExitStack() as stack:
        for site in places:
            module, *others = gated_modules(decoder, site)
            if others:
                name = decoder.layers[site.layer].name
                raise ModelError(
                    f"{name}: {site.place} used by several layers can only be ablated with 'zero'"
                )
            stack.callback(module.register_forward_pre_hook(keep(site)).remove)
        yield seen


def capture(decoder: Decoder, tokens: Int[Tensor, "batch time"], *, stop: int) -> LayerInputs:
    """Run the model through layer `stop` and keep the input of layers `0 … stop`.

    With the number of layers for `stop`, that ends with what the last one sends to the final norm. Costs
    `(stop + 1) / n_layers` of a forward pass without logits.
    """
    last = min(stop, len(decoder.layers) - 1)
    hidden: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as stack:
        for layer in decoder.layers[: stop + 1]:
            stack.enter_context(layer.module.register_forward_pre_hook(keep(layer.index), with_kwargs=True))
        stack.enter_context(kept(decoder, tokens))
        stack.enter_context(torch.inference_mode())
        output = run_until(decoder, tokens, last)
    if stop > last:
        hidden[stop] = residual(output)
    return LayerInputs(hidden, values_of(output))


def last_hidden(decoder: Decoder, batch: Batch) -> LayerInputs:
    """Return what the last layer sends to the final norm: all that is needed to make the logits again."""
    after = len(decoder.layers)
    with torch.inference_mode():
        output = run_until(decoder, batch.tokens, after - 1)
    return LayerInputs({after: residual(output)}, values_of(output))


@contextmanager
def entered_at(decoder: Decoder, layer: int, inputs: LayerInputs) -> Iterator[None]:
    """Let forward passes skip the layers before `layer`, which then sees `inputs.hidden[layer]`.

    The token ids given to the model need the same batch and time axes as the cached input. With the number
    of layers for `layer`, only the final norm and the output head run.
    """
    hidden = inputs.hidden[layer]

    def skip(*args: Any, **kwargs: Any) -> Any:
        return (hidden, *[None] * (inputs.as_tuple - 1)) if inputs.as_tuple else hidden

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    with ExitStack() as stack:
        for earlier in decoder.layers[:layer]:
            stack.enter_context(replaced_forward(earlier.module, skip))
        stack.enter_context(handed_on(decoder, layer))
        if layer < len(decoder.layers):
            module = decoder.layers[layer].module
            stack.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
        yield


def run_layer(
    decoder: Decoder, tokens: Int[Tensor, "batch time"], layer: int, inputs: LayerInputs
) -> Float[Tensor, "*stream batch time model"]:
    """Run `layer` alone on `inputs.hidden[layer]` and return its output."""
    with entered_at(decoder, layer, inputs), kept(decoder, tokens), torch.inference_mode():
        return residual(run_until(decoder, tokens, layer))


def residual(output: Any) -> Float[Tensor, "*stream batch time model"]:
    """Return the residual stream in what a layer returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def values_of(output: Any) -> int:
    """Return how many values a layer returns as a tuple, 0 where it returns the residual stream alone."""
    return len(output) if isinstance(output, tuple | list) else 0


def run_until(decoder: Decoder, tokens: Int[Tensor, "batch time"], stop: int) -> Any:
    """Run the model up to layer `stop` and return what that layer does; differentiable."""

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _LeftModelError(output)

    with decoder.layers[stop].module.register_forward_hook(leave):
        try:
            decoder.model(input_ids=tokens.to(decoder.device), use_cache=False)
        except _LeftModelError as left:
            return left.output
    raise RuntimeError(f"the forward pass of {decoder.name} never reached {decoder.layers[stop].name}")


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module compute something else for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def recomputed(decoder: Decoder) -> Iterator[None]:
    """Where weights are fetched when they are needed, let backward passes run layers again rather than keep the weights.

    Costs one more forward pass for every backward pass.
    """
    with ExitStack() as stack:
        for layer in decoder.layers if decoder.offloaded else ():
            again = partial(checkpoint, layer.module.forward, use_reentrant=False)
            stack.enter_context(replaced_forward(layer.module, again))
        yield


class InputCache:
    """Inputs of layers in intact passes, by batch and layer, within a number of bytes.

    What does not fit is computed again from the nearest earlier layer that is there; the one asked for last
    always is, so that a walk through the layers in their order costs one forward pass, whatever the limit.
    """

    def __init__(self, decoder: Decoder, groups: Sequence[Batch], limit_bytes: float) -> None:
        self._decoder, self._groups, self._limit = decoder, groups, limit_bytes
        self._kept: dict[tuple[int, int], LayerInputs] = {}
        self._last: tuple[tuple[int, int], LayerInputs] | None = None
        self._bytes = 0
        self.layers_run = 0
        """Layers run on batches so far."""

    def get(self, number: int, layer: int) -> LayerInputs:
        """Return the input of `layer` in batch `number`."""
        known = dict(self._kept)
        if self._last:
            known[self._last[0]] = self._last[1]
        start = max((at for n, at in known if n == number and at <= layer), default=-1)
        tokens = self._groups[number].tokens
        inputs = known[number, start] if start >= 0 else capture(self._decoder, tokens, stop=0)
        start = max(start, 0)
        for at in range(start, layer):
            self._keep(number, at, inputs)
            hidden = run_layer(self._decoder, tokens, at, inputs)
            inputs = LayerInputs({at + 1: hidden}, inputs.as_tuple)
        self.layers_run += layer - start
        self._keep(number, layer, inputs)
        self._last = (number, layer), inputs
        return inputs

    def _keep(self, number: int, layer: int, inputs: LayerInputs) -> None:
        hidden = inputs.hidden[layer]
        size = hidden.numel() * hidden.element_size()
        if (number, layer) not in self._kept and self._bytes + size <= self._limit:
            self._kept[number, layer] = LayerInputs({layer: hidden}, inputs.as_tuple)
            self._bytes += size
