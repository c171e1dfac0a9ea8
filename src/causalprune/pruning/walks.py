"""What a pruning run is planned to do, and the walks through the layers that gather what it has to know."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from causalprune.calibration import batches, few
from causalprune.core import Batch, Calibration, Decoder, Layer, Progress, Projection, silent
from causalprune.interventions import InputNorms, LayerInputs, Moments, capture, observed, run_layer
from causalprune.pruning.importance import Factors
from causalprune.pruning.methods import SLOPE_PASSES, Method


def _as_they_are(inputs: LayerInputs) -> LayerInputs:
    return inputs


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is settled before the first layer runs: what is pruned, how, on which batches, at what cost.

    Graded interventions see the batches of `few`. Costs are in walks through one layer: `back` for gradients at all
    outputs, `trials` for graded interventions by layer, `total` for everything. `hold` gets the inputs of layers, and
    returns them from wherever it keeps them until the layer runs.
    """

    decoder: Decoder
    method: Method
    factors: Factors
    groups: Sequence[Batch]
    few: Sequence[Batch]
    back: int
    trials: Sequence[int]
    total: int
    hold: Callable[[LayerInputs], LayerInputs] = _as_they_are


def planned(
    decoder: Decoder,
    method: Method,
    factors: Factors,
    calibration: Calibration | None = None,
    max_batch_tokens: int = 2048,
    epochs: int = 0,
) -> Plan:
    """Return the plan of a run, which looks at calibration data where the method has to, and trains for some epochs."""
    n = len(decoder.layers)
    groups: list[Batch] = []
    some: list[Batch] = []
    trials = [0] * n
    if method.needs_calibration and calibration is not None:
        unpadded = any(isinstance(layer.experts, nn.ModuleList) for layer in decoder.layers)
        size = 1 if unpadded else max_batch_tokens
        groups = batches(calibration.examples, max_batch_tokens=size)
        some = batches(few(calibration.examples), max_batch_tokens=size)
        part = sum(len(b.tokens) for b in some) / len(calibration.examples)
        trials = [round(method.trials * part * left / 2) for left in range(n, 0, -1)]
    back = round(SLOPE_PASSES / 2 * n) if "slopes" in method.needs else 0
    training = round(3 / 2 * epochs * n)  # a walk is two forward passes, an epoch three
    total = back + max(method.walks, 1) * n + sum(trials) + training
    return Plan(decoder, method, factors, groups, some, back, trials, total)


@dataclass(eq=False)
class Steps:
    """How far a run has come, and who is told."""

    total: int
    on_progress: Progress = silent
    done: int = 0

    def add(self, units: int = 1) -> None:
        """Report so many units of work."""
        self.done += units
        self.on_progress(self.done, self.total)

    def part(self, stop: int, done: int, total: int) -> None:
        """Report a part of the work up to `stop`, of which `done` of `total` steps are done."""
        self.on_progress(self.done + (stop - self.done) * done // total, self.total)


@dataclass(eq=False)
class Gathered:
    """What is known of the inputs and outputs of projections.

    `slopes` are of the intact model, `norms` of all layers that the last walk has come to, `moments` and the factor of an
    inverse of the layer at hand.
    """

    slopes: Mapping[str, Tensor] = field(default_factory=dict)
    norms: InputNorms = field(default_factory=InputNorms)
    moments: Moments = field(default_factory=Moments)
    inverse: tuple[Tensor, Tensor] | None = None
    """Second moments, and the factor of their inverse, which projections that share inputs share."""

    def see(self, projection: Projection, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Count inputs for norms and moments (a `See`)."""
        self.norms.see(projection, inputs, outputs, real)
        self.moments.see(projection, inputs, outputs, real)


def walk(
    plan: Plan, gathered: Gathered, steps: Steps, *, advance_pruned: bool, moments: bool
) -> Iterator[Layer]:
    """Yield layer after layer, what its projections see gathered in `norms` and `moments`.

    With `advance_pruned` each layer runs once more after the caller has pruned it, so that the next layer
    sees the inputs it will have; otherwise the outputs of the first run go on.
    """
    decoder, groups = plan.decoder, plan.groups
    inputs = [plan.hold(capture(decoder, batch.tokens, stop=0)) for batch in groups]
    gathered.norms, gathered.moments = InputNorms(), Moments()
    see = gathered.see if moments else gathered.norms.see
    for layer in decoder.layers:
        for number, batch in enumerate(groups):
            own = inputs[number]
            with observed(layer, batch.real, see):
                hidden = run_layer(decoder, batch.tokens, layer.index, own)
            if not advance_pruned:
                inputs[number] = plan.hold(LayerInputs({layer.index + 1: hidden}, own.as_tuple))
        yield layer
        gathered.moments, gathered.inverse = Moments(), None  # room for what the layer holds while it runs
        if advance_pruned:
            for number, batch in enumerate(groups):
                own = inputs[number]
                hidden = run_layer(decoder, batch.tokens, layer.index, own)
                inputs[number] = plan.hold(LayerInputs({layer.index + 1: hidden}, own.as_tuple))
        steps.add(1 if advance_pruned else 1 + plan.trials[layer.index])


def unrouted(plan: Plan, gathered: Gathered) -> tuple[str, ...]:
    """Return the projections that no token of the calibration reached in the last walk."""
    tokens = gathered.norms.tokens
    return tuple(p.name for p in plan.decoder.projections if plan.groups and not tokens.get(p.name))
