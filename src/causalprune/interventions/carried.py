"""Keys and values that layers hand to later ones beside the residual stream (Gemma 3n, Gemma 4).

A pass that enters in the middle needs those of the layers that it skips: they are kept by row of tokens when layers run
to make the inputs of others, and come from there. They are those of the last such run, as the inputs are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from causalprune.core import Decoder

_Row: TypeAlias = tuple[int, ...]
_KEPT: "WeakKeyDictionary[nn.Module, dict[_Row, dict[str, tuple[Tensor, Tensor]]]]" = WeakKeyDictionary()
_NAME = "shared_kv_states"


def shares(decoder: Decoder) -> bool:
    """Tell whether some layers take keys and values of earlier ones."""
    return any(getattr(m.module, "is_kv_shared_layer", False) for layer in decoder.layers for m in layer.mixers)


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
