"""What projections see and send while a layer runs: norms and second moments of inputs, gradients of outputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune.core import Layer, ModelError, Projection
from causalprune.interventions.ablation import replaced_forward
from causalprune.interventions.units import sees_all

See = Callable[
    [Projection, Float[Tensor, "token in"], Float[Tensor, "token out"], Bool[Tensor, "token"]], None
]
"""Gets a projection, its inputs and outputs in a forward pass, and False for every token that is padding."""
Slope = Callable[[Projection, Float[Tensor, "token out"]], None]
"""Gets a projection and the gradient at its outputs in a backward pass."""

_Between: TypeAlias = Callable[[Tensor], Tensor]


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

    def see(self, projection: Projection, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Count the inputs that are not padding (a `See`)."""
        self.add(projection, where(inputs, real))

    def root_mean_square(self, projection: Projection) -> Float[Tensor, "in"] | None:
        """Return the norm per input feature, or None if no token ever reached this projection."""
        if not self.tokens.get(projection.name):
            return None
        return (self.squares[projection.name] / self.tokens[projection.name]).sqrt()


@dataclass(eq=False)
class Moments:
    """Second moments `Σ x xᵀ` `[in in]` of inputs and token counts per projection name, over all batches seen.

    Projections that got the same inputs (q, k and v; gate and up) share one matrix.
    """

    hessians: dict[str, Float[Tensor, "in in"]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    _last: tuple[str, Tensor] | None = None

    def see(self, projection: Projection, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Count the inputs that are not padding (a `See`)."""
        name = projection.name
        self.tokens[name] = self.tokens.get(name, 0) + int(real.sum())
        if self._last is not None and _same(self._last[1], inputs):
            self.hessians[name] = self.hessians[self._last[0]]
            return
        self._last = name, inputs  # kept, so that no other input can take its place in memory
        own = where(inputs, real).float()
        if name not in self.hessians:
            self.hessians[name] = own.new_zeros(own.shape[1], own.shape[1])
        self.hessians[name].addmm_(own.T, own)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.numel() > 0


def where(values: Float[Tensor, "token _"], real: Bool[Tensor, "token"]) -> Float[Tensor, "some _"]:
    """Return the rows of tokens that are not padding, without a copy where all are real."""
    return values if bool(real.all()) else values[real.to(values.device)]


@contextmanager
def observed(
    layer: Layer, real: Bool[Tensor, "batch time"], see: See, slope: Slope | None = None
) -> Iterator[None]:
    """Call `see` for every projection of `layer` whenever the layer runs, and `slope` whenever gradients go back.

    `real` is False on padding. An expert sees the tokens routed to it; experts that are modules of their
    own hide where their tokens stood, so they need batches without padding. Stacked experts run one after
    the other here, which changes sums by rounding only.
    """
    by_module: dict[nn.Module, list[Projection]] = {}
    for projection in layer.projections:
        by_module.setdefault(projection.module, []).append(projection)
    with ExitStack() as stack:
        for module, projections in by_module.items():
            if module is layer.experts:
                stack.enter_context(_one_by_one(module, projections, real.flatten(), see, slope))
            else:
                handle = module.register_forward_hook(_linear_hook(projections, real.flatten(), see, slope))
                stack.callback(handle.remove)
        yield


def _linear_hook(projections: list[Projection], real: Tensor, see: See, slope: Slope | None) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs, outputs = args[0].flatten(0, -2), output.flatten(0, -2)
        own = torch.ones(len(inputs), dtype=torch.bool) if bool(real.all()) else real
        _follow(output, projections, slope)
        for projection in projections:
            see(projection, inputs, _rows(outputs, projection), own)

    return hook


@contextmanager
def _one_by_one(
    module: Any, projections: list[Projection], real: Tensor, see: See, slope: Slope | None
) -> Iterator[None]:
    """Let the experts of `module` run one after the other, by its own weights, biases and activation."""
    by_expert: dict[int, dict[str, Projection]] = {}
    for projection in projections:
        assert projection.expert is not None
        by_expert.setdefault(projection.expert, {})[projection.role] = projection
    apply = _activation(module, by_expert.values())

    def run(expert: int, inputs: Tensor, at: Tensor) -> Tensor:
        own = by_expert[expert]
        first = [own[role] for role in ("gate", "up") if role in own]
        inner = inputs @ _stored(first[0]).T + _bias(module, "gate_up_proj_bias", expert)
        gated = apply(inner)
        outer = gated @ _stored(own["down"]).T + _bias(module, "down_proj_bias", expert)
        _follow(inner, first, slope)
        _follow(outer, [own["down"]], slope)
        for p in first:
            see(p, inputs, _rows(inner, p), at)
        see(own["down"], gated, outer, at)
        return outer

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        if len(args) + len(kwargs) == 1:  # every expert has a row for every token
            blocks = args[0].view(len(by_expert), -1, args[0].shape[-1])
            found = []
            for expert, block in enumerate(blocks):
                (token,) = torch.where(block.abs().amax(-1) > 0)
                outer = run(expert, block[token], real.to(token.device)[token].cpu())
                found.append(torch.zeros_like(block).index_add(0, token, outer))
            return torch.stack(found).flatten(0, 1)
        hidden, chosen, weights = (*args, *kwargs.values())
        flat = hidden.flatten(0, -2)
        total = torch.zeros_like(flat)
        for expert in by_expert:
            token, rank = torch.where(chosen == expert)
            outer = run(expert, flat[token], real.to(token.device)[token].cpu())
            total = total.index_add(0, token, (outer * weights[token, rank, None]).to(total.dtype))
        return total.view_as(hidden)

    with replaced_forward(module, forward):
        yield


def _activation(module: Any, experts: Iterable[dict[str, Projection]]) -> _Between:
    """Return what experts do between their matrices: what transformers says of them, or what Llama 4 does."""
    for own in experts:
        fused = own.get("gate") and own["gate"].parameter is own["up"].parameter
        plain = "gate" not in own and not getattr(module, "has_gate", True)
        known = hasattr(module, "_apply_gate") or sees_all(module)
        if not (fused or plain) or not known or getattr(module, "has_post_expert_norm", False):
            raise ModelError(f"what happens inside the experts of a {type(module).__name__} is not known")
    if not getattr(module, "has_gate", True):
        return cast("_Between", module.act_fn)
    if hasattr(module, "_apply_gate"):
        return cast("_Between", module._apply_gate)  # noqa: SLF001
    return lambda inner: cast("Tensor", module.act_fn(inner.chunk(2, -1)[0]) * inner.chunk(2, -1)[1])


def _rows(outputs: Float[Tensor, "token fused"], projection: Projection) -> Float[Tensor, "token out"]:
    """Return a projection's own outputs among those of all that share its parameter."""
    return outputs if projection.rows is None else outputs[:, projection.rows]


def _follow(output: Float[Tensor, "..."], projections: list[Projection], slope: Slope | None) -> None:
    """Hand the gradient at `output` to `slope`, if there is one, when it is known; each projection its own rows."""
    if slope is None or not torch.is_grad_enabled():  # a pass whose way back comes later
        return

    def hook(gradient: Tensor) -> None:
        for p in projections:
            slope(p, _rows(gradient.flatten(0, -2), p))

    output.register_hook(hook)


def _stored(projection: Projection) -> Float[Tensor, "fused in"]:
    """Return an expert's matrix with all roles that share it, in the order that `_apply_gate` wants."""
    stored = projection.parameter.data[projection.expert]
    return stored.T if projection.transposed else stored


def _bias(module: Any, name: str, expert: int) -> Float[Tensor, "fused"] | float:
    bias = getattr(module, name, None)
    return 0.0 if bias is None else bias[expert]
