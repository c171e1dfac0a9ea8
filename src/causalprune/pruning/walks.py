"""What a pruning run is planned to do, and the walks through the layers that gather what it has to know."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from causalprune.calibration import batches, check_positions, few
from causalprune.core import Batch, Calibration, Decoder, Layer, Projection, State
from causalprune.interventions import (
    Hold,
    InputNorms,
    LayerInputs,
    Moments,
    as_they_are,
    capture,
    observed,
    on_cpu,
    run_layer,
    shares,
)
from causalprune.pruning.criteria import LOOKS, TRAINS
from causalprune.pruning.importance import Factors
from causalprune.pruning.methods import Method
from causalprune.pruning.parts import Costs, Steps, costs
from causalprune.pruning.training import batches_of

INPUTS = {False: "intact_inputs", True: "pruned_inputs"}
"""What inputs of layers are kept as, by whether the layers before are pruned."""


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is settled before the first layer runs: what is pruned, how, on which batches, at what cost.

    Graded interventions see the batches of `few`. Batches that are `taught` are those that training follows, where gradients take
    the same ones. `hold` gets the inputs of layers, and returns them from wherever it
    keeps them until the layer runs; with one, layers are in memory one at a time. What takes long is kept in the `state`.
    """

    decoder: Decoder
    method: Method
    factors: Factors
    groups: Sequence[Batch]
    few: Sequence[Batch]
    costs: Costs
    hold: Hold | None = None
    state: State = field(default_factory=State)
    taught: Sequence[Batch] = ()


def planned(
    decoder: Decoder,
    method: Method,
    factors: Factors,
    calibration: Calibration | None = None,
    max_batch_tokens: int = 2048,
) -> Plan:
    """Return the plan of a run, which looks at calibration data where the method has to."""
    groups: list[Batch] = []
    some: list[Batch] = []
    taught: list[Batch] = []
    if method.needs_calibration and calibration is not None:
        check_positions(decoder, calibration.examples)
        unpadded = any(isinstance(layer.experts, nn.ModuleList) for layer in decoder.layers)
        size = 1 if unpadded else max_batch_tokens
        groups = batches(calibration.examples, max_batch_tokens=size)
        some = batches(few(calibration.examples), max_batch_tokens=size)
        if "slopes" in method.needs and method.resolved_update in TRAINS and not unpadded:
            taught = batches_of(calibration.examples, max_batch_tokens)
    own = costs(decoder, method, groups, some, taught=bool(taught))
    return Plan(decoder, method, factors, groups, some, own, taught=taught)


@dataclass(eq=False)
class Gathered:
    """What is known of the inputs and outputs of projections.

    `slopes` and `gradients` (at weights) are of the intact model, `norms` of all layers that the last walk has come to, `moments` and the factor of an
    inverse of the layer at hand.
    """

    slopes: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    norms: InputNorms = field(default_factory=InputNorms)
    moments: Moments = field(default_factory=Moments)
    inverse: tuple[Tensor, Tensor] | None = None
    """Second moments, and the factor of their inverse, which projections that share inputs share."""

    def see(self, projection: Projection, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Count inputs for norms and moments (a `See`)."""
        self.norms.see(projection, inputs, outputs, real)
        self.moments.see(projection, inputs, outputs, real)


def walk(
    plan: Plan, gathered: Gathered, steps: Steps, *, advance_pruned: bool, moments: bool, first: int = 0
) -> Iterator[Layer]:
    """Yield layer after layer from the `first` on, what its projections see gathered in `norms` and `moments`.

    With `advance_pruned` each layer runs once more after the caller has pruned it, so that the next layer
    sees the inputs it will have; otherwise the outputs of the first run go on. Where it begins later, the layers before
    are as the caller left them in a run that was stopped, and the inputs come from what the `state` has of those.
    """
    decoder, groups, hold = plan.decoder, plan.groups, plan.hold or as_they_are
    if first == len(decoder.layers):
        return
    name = INPUTS[advance_pruned]
    inputs = _entering(plan, first, name)
    if not first:
        gathered.norms = InputNorms()
    gathered.moments = Moments()
    see = gathered.see if moments else gathered.norms.see
    steps.tell(first, len(decoder.layers))
    for layer in decoder.layers[first:]:
        for number, batch in enumerate(groups):
            own = inputs[number]
            with observed(layer, batch.real, see):
                hidden = run_layer(decoder, batch.tokens, layer.index, own)
            if not advance_pruned:
                inputs[number] = hold(LayerInputs({layer.index + 1: hidden}, own.as_tuple))
        yield layer
        gathered.moments, gathered.inverse = Moments(), None  # room for what the layer holds while it runs
        if advance_pruned:
            for number, batch in enumerate(groups):
                own = inputs[number]
                hidden = run_layer(decoder, batch.tokens, layer.index, own)
                inputs[number] = hold(LayerInputs({layer.index + 1: hidden}, own.as_tuple))
        if plan.state.due() and (
            plan.hold is None or plan.method.takes_long
        ):  # else all of them would be in memory
            after = layer.index + 1
            found = {"layer": after, "hidden": on_cpu(inputs, after), "as_tuple": inputs[0].as_tuple}
            plan.state.flush(**{name: found})
        steps.tell(layer.index + 1, len(decoder.layers))


def _entering(plan: Plan, first: int, name: str) -> list[LayerInputs]:
    """Return the inputs of a layer for every batch, from the nearest layer before it whose inputs were kept."""
    decoder, known, hold = plan.decoder, plan.state.values.pop(name, None), plan.hold or as_they_are
    if known is None or known["layer"] > first or shares(decoder):
        at = 0
        inputs = [hold(capture(decoder, batch.tokens, stop=0)) for batch in plan.groups]
    else:
        at, device = known["layer"], decoder.layers[known["layer"]].projections[0].device
        inputs = []
        for own in known["hidden"]:
            inputs.append(
                hold(LayerInputs({at: own.to(device, copy=True)}, known["as_tuple"]))
            )  # out of the file
    for index in range(at, first):
        for number, batch in enumerate(plan.groups):
            entered = inputs[number]
            looking = observed(decoder.layers[index], batch.real, _unseen)  # as then: experts one by one
            with looking if name == INPUTS[False] else nullcontext():
                hidden = run_layer(decoder, batch.tokens, index, entered)
            inputs[number] = hold(LayerInputs({index + 1: hidden}, entered.as_tuple))
    return inputs


def _unseen(p: Projection, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
    """Look at nothing."""


def unrouted(plan: Plan, gathered: Gathered) -> tuple[str, ...]:
    """Return the projections that no token of the calibration reached in the last walk; none where pruning looks at no inputs."""
    tokens, method = gathered.norms.tokens, plan.method
    if not method.needs & LOOKS and method.resolved_update == "none":  # a stopped walk of trials saw some
        return ()
    return tuple(p.name for p in plan.decoder.projections if plan.groups and not tokens.get(p.name))
