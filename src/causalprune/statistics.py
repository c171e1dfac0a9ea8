"""Statistics of the inputs of projections, gathered while a layer runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune.errors import ModelError
from causalprune.types import Layer, Projection


@dataclass(eq=False)
class InputNorms:
    """Sums of squared inputs `[in]` and token counts per projection name, over all batches seen."""

    squares: dict[str, Float[Tensor, "in"]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, projection: Projection, inputs: Float[Tensor, "token in"]) -> None:
        """Count the inputs of one projection; squares are summed in float64 across batches."""
        squares = inputs.float().square().sum(0).double()
        self.squares[projection.name] = self.squares.get(projection.name, 0) + squares
        self.tokens[projection.name] = self.tokens.get(projection.name, 0) + len(inputs)

    def root_mean_square(self, projection: Projection) -> Float[Tensor, "in"] | None:
        """Return the norm per input feature, or None if no token ever reached this projection."""
        if not self.tokens.get(projection.name):
            return None
        return (self.squares[projection.name] / self.tokens[projection.name]).sqrt()


@contextmanager
def gathered(layer: Layer, norms: InputNorms, real: Bool[Tensor, "batch time"]) -> Iterator[None]:
    """Add the inputs of every projection of `layer` to `norms` while the layer runs.

    `real` is False on padding, which is not counted. An expert counts the tokens routed to it; experts
    that are modules of their own hide where their tokens stood, so they need batches without padding.
    """
    by_module: dict[nn.Module, list[Projection]] = {}
    for projection in layer.projections:
        by_module.setdefault(projection.module, []).append(projection)
    with ExitStack() as stack:
        for module, projections in by_module.items():
            hook = _expert_hook if module is layer.experts else _linear_hook
            handle = module.register_forward_pre_hook(hook(projections, norms, real.flatten()))
            stack.callback(handle.remove)
        yield


def _linear_hook(projections: list[Projection], norms: InputNorms, real: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2)
        if not bool(real.all()):
            inputs = inputs[real.to(inputs.device)]
        for projection in projections:
            norms.add(projection, inputs)

    return hook


def _expert_hook(projections: list[Projection], norms: InputNorms, real: Tensor) -> Any:
    by_expert: dict[int, dict[str, Projection]] = {}
    for projection in projections:
        assert projection.expert is not None
        by_expert.setdefault(projection.expert, {})[projection.role] = projection

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs, chosen = args[0].flatten(0, -2), args[1]
        routed = real.to(inputs.device)[:, None] & torch.ones_like(chosen, dtype=torch.bool)
        for expert, own in by_expert.items():
            mine = inputs[((chosen == expert) & routed).any(-1)]
            norms.add(own["down"], _gated(module, own, mine))
            norms.add(own["gate"], mine)
            norms.add(own["up"], mine)

    return hook


def _gated(module: Any, own: dict[str, Projection], inputs: Tensor) -> Tensor:
    """Return what the down projection of an expert sees, by the module's own biases and activation."""
    gate = own.get("gate")
    if gate is None or gate.parameter is not own["up"].parameter or not hasattr(module, "_apply_gate"):
        raise ModelError(f"what happens inside the experts of a {type(module).__name__} is not known")
    stored = gate.parameter.data[gate.expert]  # with the rows of up, in the order that `_apply_gate` wants
    inner = inputs @ (stored if gate.transposed else stored.T)
    bias = getattr(module, "gate_up_proj_bias", None)
    gated: Tensor = module._apply_gate(inner if bias is None else inner + bias[gate.expert])  # noqa: SLF001
    return gated
