"""Keys and values that layers hand to later ones beside the residual stream (Gemma 3n, Gemma 4).

A pass that enters in the middle needs those of the layers that it skips: they are kept by row of tokens when layers run
to make the inputs of others, and come from there. They are those of the last such run, as the inputs are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from causalprune.core import Decoder, Layer

_Row: TypeAlias = tuple[int, ...]
_KEPT: "WeakKeyDictionary[nn.Module, dict[_Row, dict[str, tuple[Tensor, Tensor]]]]" = WeakKeyDictionary()
_NAME = "shared_kv_states"
Handed: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Keys and values that a layer hands on, by kind of layer."""


def shares(decoder: Decoder) -> bool:
    """Tell whether some layers take keys and values of earlier ones."""
    return any(
        getattr(m.module, "is_kv_shared_layer", False) for layer in decoder.layers for m in layer.mixers
    )


@contextmanager
def kept(decoder: Decoder, tokens: Tensor) -> Iterator[None]:
    """Keep what layers hand on in passes of these tokens."""
    if not shares(decoder):
        yield
        return
    seen: list[Any] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen[:] = [kwargs[_NAME]]

    handles = [layer.module.register_forward_pre_hook(look, with_kwargs=True) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    rows = _KEPT.setdefault(decoder.model, {})
    for name, (keys, values) in seen[0].items():
        for row, key, value in zip(tokens.tolist(), keys.detach(), values.detach(), strict=True):
            rows.setdefault(tuple(row), {})[name] = key, value


@contextmanager
def handed_on(decoder: Decoder, layer: int) -> Iterator[None]:
    """Let passes that enter at a layer have what those before have handed on."""
    if not shares(decoder) or layer == len(decoder.layers):
        yield
        return
    tokens: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens[:] = [kwargs["input_ids"]]

    def fill(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        known = [_KEPT.get(decoder.model, {}).get(tuple(row), {}) for row in tokens[0].tolist()]
        for name in set.intersection(*map(set, known)):
            kwargs[_NAME][name] = tuple(torch.stack([row[name][i] for row in known]) for i in (0, 1))

    handles = [
        decoder.model.register_forward_pre_hook(look, with_kwargs=True),
        decoder.layers[layer].module.register_forward_pre_hook(fill, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Handing:
    """What layers hand on in a pass that is gone back through layer by layer: leaves in its place, and the slopes at them."""

    def __init__(self, decoder: Decoder) -> None:
        self._shares = shares(decoder)
        self._leaves: dict[str, tuple[Tensor, Tensor]] = {}
        self._slopes: dict[int, Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """All leaves."""
        return [leaf for pair in self._leaves.values() for leaf in pair]

    @contextmanager
    def through(self, layer: Layer) -> Iterator[Handed]:
        """Give leaves to a layer that runs in the block, and collect what it hands on itself."""
        handed: Handed = {}
        if not self._shares:
            yield handed
            return
        seen: list[Any] = []

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            kwargs[_NAME].update(self._leaves)
            seen[:] = [kwargs[_NAME]]

        handle = layer.module.register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield handed
        finally:
            handle.remove()
        handed.update({name: pair for name, pair in seen[0].items() if pair is not self._leaves.get(name)})

    def take(self, handed: Handed) -> None:
        """Put leaves in the place of what a layer has handed on."""
        for name, (keys, values) in handed.items():
            self._leaves[name] = keys.detach().requires_grad_(), values.detach().requires_grad_()

    def back(self, handed: Handed) -> tuple[list[Tensor], list[Tensor]]:
        """Return what a layer has handed on, and the slopes that later ones have added up there."""
        pairs = [
            (own, leaf) for n, pair in handed.items() for own, leaf in zip(pair, self._leaves[n], strict=True)
        ]
        pairs = [(own, leaf) for own, leaf in pairs if own.requires_grad]
        return [own for own, _ in pairs], [
            self._slopes.get(id(leaf), torch.zeros_like(leaf)) for _, leaf in pairs
        ]

    def add(self, slopes: Sequence[Tensor | None]) -> None:
        """Add up slopes at all leaves."""
        for leaf, slope in zip(self.tensors, slopes, strict=True):
            if slope is not None:
                self._slopes[id(leaf)] = self._slopes.get(id(leaf), 0) + slope
