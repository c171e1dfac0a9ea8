"""Where weights lie: on their devices, and where cache lines begin, as bits of products depend on that."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from causalprune.core import aligned


def place(model: Any, device: str | None) -> None:
    """Bring a model to its device, unless it is spread over several, and its weights to where cache lines begin."""
    if device is not None:
        model.to(device)
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = aligned(parameter.data)
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            hook.weights_map = _Aligned(hook.weights_map)


class _Aligned(Mapping[str, Tensor]):
    """Weights that accelerate brings when they are needed."""

    def __init__(self, own: Mapping[str, Tensor]) -> None:
        self._own = own

    def __getitem__(self, name: str) -> Tensor:
        return aligned(self._own[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
