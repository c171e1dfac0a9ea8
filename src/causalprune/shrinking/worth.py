"""What units are worth: by effect on the calibration, by activation, by magnitude, or at random."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalprune.attribution import Estimator, Question, attribute
from causalprune.calibration import OWN_TEXT, batches, few
from causalprune.core import (
    Calibration,
    Decoder,
    Example,
    Layer,
    OptionError,
    Progress,
    Projection,
    UnitKind,
    say,
    silent,
    unknown,
)
from causalprune.interventions import InputNorms, See, Site, gated_module, observed, sees_all
from causalprune.pruning import UPDATES

Kind: TypeAlias = Literal["neurons", "kv_groups", "experts", "layers"]
Scores: TypeAlias = Mapping[int, Float[Tensor, "_"]]
"""What every unit of a kind is worth, by layer; for whole layers one number each."""

UNITS: dict[Kind, UnitKind] = {
    "neurons": "neurons",
    "kv_groups": "kv_group",
    "experts": "expert",
    "layers": "layer",
}
"""What a unit of every kind is called where effects are measured."""
KINDS: tuple[Kind, ...] = tuple(UNITS)
BY = ("effect", "activation", "magnitude", "random")


@dataclass(frozen=True)
class Shrinking:
    """How units are chosen (`by`), how the others make up for them, and how many tokens a pass may have.

    `by` is what units are worth: `effect` (the divergence from the intact model's predictions on the calibration targets
    without the unit: measured for KV groups, experts and layers that are named, predicted to second order for neurons and
    where kinds compete for a budget), `activation` (root mean
    square of what a neuron or the heads of a group send; for experts weighted by the router, which is REAP), `magnitude`
    (of their weights; 0 where a neuron or group sends nothing) or `random`. `update` is that of `Method`: `distill` and `adam` train the smaller model after `refit`.
    """

    by: str = "effect"
    update: str = "distill"
    seed: int = 0
    max_batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise unknown("choice of units (by)", self.by, BY)
        if self.update not in UPDATES:
            raise unknown("update", self.update, UPDATES)


def sizes_of(decoder: Decoder, kind: Kind) -> dict[int, int]:
    """Return the number of units of a kind in every layer that has some."""
    sizes = {layer.index: n for layer in decoder.layers if (n := _count(layer, kind))}
    if not sizes:
        raise OptionError(f"{decoder.name} has no {kind.replace('_', ' ')} that could go")
    return sizes


def worth_of(
    decoder: Decoder,
    kind: Kind,
    calibration: Calibration,
    how: Shrinking,
    on_progress: Progress,
    ledger: Path | None,
) -> Scores:
    """Return what every unit of a kind is worth, by layer; effects are kept in the ledger. NaN where that is not known."""
    sizes = sizes_of(decoder, kind)
    if how.by == "random":
        generator = torch.Generator().manual_seed(how.seed)
        return {layer: torch.rand(n, generator=generator) for layer, n in sizes.items()}
    if how.by == "magnitude":
        return {i: _magnitude(decoder.layers[i], kind, n) for i, n in sizes.items()}
    if how.by == "activation":
        return _activation(decoder, kind, calibration, on_progress)
    every = calibration
    if kind != "neurons":
        some = tuple(few(calibration.examples))
        calibration = Calibration(some, (0,) * len(some), calibration.description)
    estimator = Estimator("gradient" if kind == "neurons" else "exact", seed=how.seed)
    estimator = replace(estimator, max_batch_tokens=how.max_batch_tokens)
    found = _effects(decoder, [kind], calibration, estimator, on_progress, ledger)[kind]
    return _filled(decoder, every, found) if kind == "experts" else found


def _filled(decoder: Decoder, every: Calibration, worths: Scores) -> Scores:
    """Return what experts are worth, those that the few examples do not reach, and all do, as much as the others of their layer."""
    if not any(bool(own.isnan().any()) for own in worths.values()):
        return worths
    norms, found = InputNorms(), dict(worths)
    layers = [decoder.layers[layer] for layer in worths]
    _look(decoder, layers, every, norms.see, silent)
    for layer, own in worths.items():
        downs = [p for p in decoder.layers[layer].projections if p.role == "down" and p.expert is not None]
        reached = torch.tensor([bool(norms.tokens.get(p.name)) for p in downs])
        found[layer] = torch.where(own.isnan() & reached, own.nanmean(), own)
    return found


def worths_of(
    decoder: Decoder,
    kinds: Sequence[Kind],
    calibration: Calibration,
    how: Shrinking,
    on_progress: Progress,
    ledger: Path | None,
) -> dict[Kind, Scores]:
    """Return what every unit of several kinds is worth, as far as the choice knows it; effects are predicted, all in one pass."""
    if how.by == "effect":
        estimator = Estimator("gradient", seed=how.seed, max_batch_tokens=how.max_batch_tokens)
        return _effects(decoder, kinds, calibration, estimator, on_progress, ledger)
    known = [kind for kind in kinds if (kind, how.by) != ("layers", "activation")]
    return {kind: worth_of(decoder, kind, calibration, how, on_progress, ledger) for kind in known}


def _effects(
    decoder: Decoder,
    kinds: Sequence[Kind],
    calibration: Calibration,
    estimator: Estimator,
    on_progress: Progress,
    ledger: Path | None,
) -> dict[Kind, Scores]:
    """Return the divergence that every unit of some kinds stands for, by kind and layer, summed over the examples (`balance`)."""
    names: dict[Kind, str] = {kind: "neurons:1" if kind == "neurons" else kind for kind in kinds}
    question = Question(units=tuple(names.values()), effect="kl")
    effects = attribute(decoder, calibration, question, estimator, ledger=ledger, on_progress=on_progress)
    values = effects.change_nats() if effects.predicted_nats is None else effects.predicted_nats
    found: dict[Kind, Scores] = {}
    for kind in kinds:
        own = [(at, unit.layer) for at, unit in enumerate(effects.units) if unit.kind == UNITS[kind]]
        numbers, layers = (torch.tensor(column) for column in zip(*own, strict=True))
        sums = (values * torch.tensor(balance(calibration.examples, calibration.description))).sum(1)[numbers]
        found[kind] = {layer: sums[layers == layer] for layer in sizes_of(decoder, kind)}
    return found


def balance(examples: Sequence[Example], told: Mapping[str, Any]) -> list[float]:
    """Return what a token of every example counts: what is preserved beside a task counts no more than that, all together."""
    beside = {OWN_TEXT, *told.get("preserve", ())}
    kept = [example.source in beside for example in examples]
    task, rest = (
        sum(e.target_tokens for e, own in zip(examples, kept, strict=True) if own == which)
        for which in (False, True)
    )
    part = task / rest if rest > task > 0 else 1.0
    return [part if own else 1.0 for own in kept]


def _count(layer: Layer, kind: Kind) -> int:
    dense = [p.shape[1] for p in layer.projections if p.name == f"layers.{layer.index}.down"]
    counts: Mapping[Kind, int] = {
        "neurons": dense[0] if dense else 0,
        "kv_groups": mixer.n_kv_heads if (mixer := layer.mixer("heads")) else 0,
        "experts": layer.n_experts,
        "layers": 1,
    }
    return counts[kind]


def _magnitude(layer: Layer, kind: Kind, n: int) -> Float[Tensor, "unit"]:
    """Return the sum of squares of the weights of every unit of a layer; neurons and groups that send nothing are worth nothing."""
    found, sent = torch.zeros(n), torch.ones(n)
    for p in layer.projections:
        squares, dense = p.read().float().square(), p.name.count(".") == 2
        if kind == "layers":
            found += squares.sum().cpu()
        elif kind == "experts" and p.place == "experts":
            found[int(p.name.split(".")[3])] += squares.sum().cpu()
        elif dense and (
            (kind == "kv_groups" and p.blocks) or (kind == "neurons" and p.role in ("gate", "up", "down"))
        ):
            own = squares.sum(0 if p.role in ("o", "down") else 1).view(n, -1).sum(1).cpu()
            found += own
            sent = own if p.role in ("o", "down") else sent
    return found.masked_fill(sent == 0, 0.0)


def _activation(decoder: Decoder, kind: Kind, calibration: Calibration, on_progress: Progress) -> Scores:
    """Return the sum of squares of what every unit sends to its output projection, over real tokens."""
    if kind == "experts":
        return _router_weighted(decoder, calibration, on_progress)
    if kind == "layers":
        raise OptionError("layers cannot be chosen by activation: by effect, magnitude or random")
    norms, role = InputNorms(), "down" if kind == "neurons" else "o"
    _look(decoder, decoder.layers, calibration, norms.see, on_progress)
    sums: dict[int, Tensor] = {}
    for layer in decoder.layers:
        if n := _count(layer, kind):
            squares = norms.squares[f"layers.{layer.index}.{role}"]
            sums[layer.index] = squares.view(n, -1).sum(1).cpu()
    return sums


def _look(
    decoder: Decoder, layers: Sequence[Layer], calibration: Calibration, see: See, on_progress: Progress
) -> None:
    """Run the calibration examples, and let `see` look at the projections of these layers."""
    groups = batches(calibration.examples, max_batch_tokens=1)  # one by one: no padding
    say(on_progress, unit="examples")
    for done, batch in enumerate(groups, start=1):
        with ExitStack() as stack, torch.inference_mode():
            for layer in layers:
                stack.enter_context(observed(layer, batch.real, see))
            decoder.model(input_ids=batch.tokens.to(decoder.device), use_cache=False)
        on_progress(done, len(groups))


def _router_weighted(decoder: Decoder, calibration: Calibration, on_progress: Progress) -> Scores:
    """Return the mean of gate · ‖output‖ over the tokens of every routed expert (REAP, arXiv 2510.13999).

    NaN for experts that no token reaches.
    """
    layers = [layer for layer in decoder.layers if layer.n_experts]
    if any(isinstance(layer.experts, nn.Module) and sees_all(layer.experts) for layer in layers):
        raise OptionError(
            f"experts of {decoder.name} get inputs that are weighted already: choose them by effect, magnitude or random"
        )
    sums = {layer.index: torch.zeros(2, layer.n_experts, dtype=torch.float64) for layer in layers}
    routed: dict[int, tuple[Tensor, Tensor]] = {}

    def route(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            routed[layer] = args[1], args[2]

        return hook

    def see(p: Projection, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        if p.role == "down" and p.expert is not None:
            chosen, weights = routed[p.layer]
            gates = weights[torch.where(chosen == p.expert)]
            norms = (gates * outputs.float().norm(dim=-1)).double().sum()
            sums[p.layer][:, p.expert] += torch.stack([norms.cpu(), torch.tensor(float(len(gates)))])

    with ExitStack() as stack:
        for layer in layers:
            module = gated_module(decoder, Site(layer.index, "experts"))
            stack.enter_context(module.register_forward_pre_hook(route(layer.index)))
        _look(decoder, layers, calibration, see, on_progress)
    return {layer: total / tokens for layer, (total, tokens) in sums.items()}
