"""Which units go for good, and what the others do to make up for them: a smaller and faster standard model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.attribution import Estimator, Question, attribute
from causalprune.calibration import batches, few
from causalprune.core import (
    Calibration,
    Decoder,
    Layer,
    ModelError,
    OptionError,
    Progress,
    Projection,
    Shown,
    Stage,
    State,
    bars,
    say,
    unknown,
)
from causalprune.interventions import InputNorms, See, Site, gated_module, observed
from causalprune.models import fingerprint
from causalprune.pruning import TRAINS, UPDATES, Lesson, Method, Repair, Update, lessons, remove
from causalprune.shrinking.structure import Kept, column_keep, silence, smaller

Kind: TypeAlias = Literal["neurons", "kv_groups", "experts", "layers"]
Scores: TypeAlias = Mapping[int, Float[Tensor, "_"]]
"""What every unit of a kind is worth, by layer; for whole layers one number each."""

KINDS: tuple[Kind, ...] = ("neurons", "kv_groups", "experts", "layers")
BY = ("effect", "activation", "magnitude", "random")
LOOKING = {"effect": 5.0, "activation": 1.0}
"""Passes of all examples that it takes, about, to know what units are worth."""
MULTIPLE = 32
"""Widths of MLPs stay multiples of this where they are, as kernels like them."""


@dataclass(frozen=True)
class Shares:
    """The share of units of every kind that goes, 0 … 1."""

    neurons: float = 0.0
    kv_groups: float = 0.0
    experts: float = 0.0
    layers: float = 0.0

    def __post_init__(self) -> None:
        for kind, share in asdict(self).items():
            if not 0 <= share < 1:
                raise OptionError(
                    f"the share of {kind} that goes must be at least 0 and below 1, not {share}"
                )
        if not any(asdict(self).values()):
            raise OptionError(
                "nothing to remove: name a share of parameters, neurons, KV groups, experts or layers"
            )


@dataclass(frozen=True)
class Shrinking:
    """How units are chosen (`by`), how the others make up for them, and how many tokens a pass may have.

    `by` is what units are worth: `effect` (the divergence from the intact model's predictions on the calibration targets
    without the unit: measured for KV groups, experts and layers, predicted to second order for neurons), `activation` (root
    mean square of what a neuron or the heads of a group send; for experts weighted by the router, which is REAP), `magnitude`
    (of their weights) or `random`.
    """

    by: str = "effect"
    update: str = "refit"
    seed: int = 0
    max_batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise unknown("choice of units (by)", self.by, BY)
        if self.update not in UPDATES:
            raise unknown("update", self.update, UPDATES)


@dataclass(frozen=True, eq=False, repr=False)
class Shrunk(Shown):
    """A smaller model, what it kept and how that was updated, and its number of parameters before and after.

    `unrouted` names experts that no token reached where their worth was measured: it is unknown, so they stay before others.
    `options` say how units were chosen on the `calibration`. It has no masks, nor effects that are kept.
    """

    decoder: Decoder
    kept: Kept
    update: Update
    parameters_before: int
    parameters_after: int
    unrouted: tuple[str, ...]
    calibration: Calibration
    options: dict[str, Any]
    keep: None = None
    effects: None = None

    def record(self) -> dict[str, Any]:
        """Return what the manifest of a smaller model says: what stayed, and how that was chosen."""
        kept = _listed({kind: getattr(self.kept, kind) for kind in KINDS})
        sizes = {"parameters_before": self.parameters_before, "parameters_after": self.parameters_after}
        data = {**self.calibration.description, "fingerprint": self.calibration.fingerprint}
        how = {"update": self.update, **sizes, "unrouted": list(self.unrouted), "kept": kept}
        return {"shrink": {**self.options, **how}, "calibration": data}

    def __repr__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        sizes = f"{before:,} parameters before, {after:,} after ({1 - after / before:.1%} fewer)"
        return f"Shrunk({sizes}; what stays updated by {self.update}; the model is .decoder)"


def shares_for(decoder: Decoder, parameters: float) -> Shares:
    """Return the share of MLP neurons that makes up this share of all parameters."""
    total = sum(p.numel() for p in decoder.model.parameters())
    pool = sum(
        p.size for p in decoder.projections if p.role in ("gate", "up", "down") and p.name.count(".") == 2
    )
    if not 0 < parameters * total < pool:
        most = pool / total
        raise OptionError(
            f"neurons of dense MLPs are {most:.0%} of {decoder.name}: a share of {parameters:g} of all parameters "
            "cannot come from them; name shares of KV groups, experts or layers"
        )
    return Shares(neurons=parameters * total / pool)


def shrink(
    decoder: Decoder,
    shares: Shares | float,
    calibration: Calibration,
    how: Shrinking = Shrinking(),
    *,
    ledger: Path | None = None,
    stage: Stage | None = None,
    **changes: Any,
) -> Shrunk:
    """Return a smaller model without the units that matter least, the others updated to make up for them.

    `shares` may be the share of all parameters that goes, 0 … 1, from the neurons of MLPs. All layers lose equally many
    units of a kind. `changes` are fields of `Shrinking`. Where only experts go, nothing but `distill` makes up for them. The
    decoder that is given is changed on the way. Effects that were measured, layers that were updated and training are kept in
    the `leftovers` of a path, so that a stopped run goes on. Where no `stage` is given, every stage of the work has a bar
    (`quiet`: none has).

    Raises:
        OptionError: a kind the model does not have, or a share too small to remove one unit.
        ModelError: the architecture cannot lose units of a kind, or some of the model is not in memory.
    """
    how, stage = replace(how, **changes), stage or bars
    shares = shares if isinstance(shares, Shares) else shares_for(decoder, shares)
    if decoder.offloaded:
        raise ModelError(
            f"{decoder.name} is not all in memory, which shrinking needs: leave out --device-map"
        )
    given, before = decoder, sum(p.numel() for p in decoder.model.parameters())
    update = next(own for own in UPDATES if own == how.update)
    chosen, unrouted = _chosen(decoder, shares, calibration, how, ledger=ledger, stage=stage)
    identity = [fingerprint(decoder.model), _listed(chosen), calibration.fingerprint, asdict(how)]
    state = State(leftovers(ledger)["update"] if ledger else None, identity)
    followed: Sequence[Lesson] = []
    if update in TRAINS:
        with stage("what training follows") as progress:
            say(progress, unit="batches")
            followed = lessons(decoder, calibration.examples, how.max_batch_tokens, state, progress)
    if "experts" in chosen:
        decoder = smaller(decoder, Kept(experts=chosen["experts"]))
        update = update if update in TRAINS or len(chosen) > 1 else "none"
    kept = Kept(**{**chosen, "experts": {}})
    with stage("updating what stays") as progress:
        silence(decoder, kept)
        repair = Repair(calibration, update, followed, how.seed, how.max_batch_tokens)
        remove(decoder, column_keep(decoder, kept), repair, progress, state)
    found = replace(smaller(decoder, kept), fingerprint=given.fingerprint)  # that of its base, as pruned ones
    after = sum(p.numel() for p in found.model.parameters())
    kept = replace(kept, experts=chosen.get("experts", {}))
    options = {"by": how.by, "seed": how.seed, "shares": asdict(shares)}
    return Shrunk(found, kept, update, before, after, unrouted, calibration, options)


def _listed(kept: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the indices that stay, by kind and layer, as JSON takes them."""
    return {
        kind: [*own] if isinstance(own, tuple) else {str(i): index.tolist() for i, index in own.items()}
        for kind, own in kept.items()
        if own
    }


def leftovers(path: Path) -> dict[str, Path]:
    """Return the file in which the effects of every kind are kept, and the folder of the `update` of what stays."""
    return {what: path.with_name(f"{path.name}.{what}") for what in (*KINDS, "update")}


def _chosen(
    decoder: Decoder,
    shares: Shares,
    calibration: Calibration,
    how: Shrinking,
    *,
    ledger: Path | None,
    stage: Stage,
) -> tuple[dict[Kind, Any], tuple[str, ...]]:
    """Return the indices that stay of every kind that loses some, and the experts that no token reached.

    What cannot be is refused before anything is measured.
    """
    wanted = {kind: share for kind in KINDS if (share := asdict(shares)[kind])}
    some = {kind: {i: torch.zeros(n) for i, n in _sizes(decoder, kind).items()} for kind in wanted}
    smaller(decoder, Kept(**{kind: _kept(kind, some[kind], share) for kind, share in wanted.items()}))
    chosen: dict[Kind, Any] = {}
    unrouted: list[str] = []
    for kind, share in wanted.items():
        with stage(_worth_of(kind)) as progress:
            if not chosen:
                say(progress, jobs=shrink_jobs(decoder, shares, calibration, how))
            path = None if ledger is None else leftovers(ledger)[kind]
            worth = _worth(decoder, kind, calibration, how, progress, path)
        chosen[kind] = _kept(kind, worth, share)
        for layer, own in worth.items() if kind == "experts" else ():
            unrouted += [f"layers.{layer}.experts.{i}" for i in own.isnan().nonzero()[:, 0].tolist()]
    return chosen, tuple(unrouted)


def _worth_of(kind: str) -> str:
    return f"what {kind.replace('_', ' ')} are worth"


def shrink_jobs(
    decoder: Decoder, shares: Shares, calibration: Calibration, how: Shrinking
) -> dict[str, float]:
    """Return the stages of `shrink` in their order, with what they cost in passes of all examples."""
    method, tokens = (
        Method("magnitude", 0.5, update=how.update),
        sum(len(e.tokens) for e in calibration.examples),
    )
    found = {_worth_of(kind): LOOKING.get(how.by, 0.001) for kind, share in asdict(shares).items() if share}
    found |= {"what training follows": 1.0} if how.update in TRAINS else {}
    passes = method.passes(len(decoder.layers), len(calibration.examples), tokens)  # whatever the share
    return {**found, "updating what stays": passes}


def _kept(kind: Kind, worth: Scores, share: float) -> Any:
    """Return the indices that stay: in every layer, or of the layers."""
    if kind == "layers":
        return tuple(_best(torch.cat([worth[i] for i in sorted(worth)]), kind, share).tolist())
    return {layer: _best(own, kind, share) for layer, own in worth.items()}


def _best(worth: Float[Tensor, "unit"], kind: Kind, share: float) -> Tensor:
    n = len(worth)
    step = MULTIPLE if kind == "neurons" and n % MULTIPLE == 0 and n > MULTIPLE else 1
    left = max(round(n * (1 - share) / step) * step, step)
    if left == n:
        raise OptionError(
            f"a share of {share:g} of {n} {kind.replace('_', ' ')} is less than one step of {step}: "
            f"ask for {step / n:.2g} or more, or leave it out"
        )
    return worth.nan_to_num(nan=torch.inf).argsort(descending=True, stable=True)[:left].sort().values


def _sizes(decoder: Decoder, kind: Kind) -> dict[int, int]:
    """Return the number of units of a kind in every layer that has some."""
    sizes = {layer.index: n for layer in decoder.layers if (n := _count(layer, kind))}
    if not sizes:
        raise OptionError(f"{decoder.name} has no {kind.replace('_', ' ')} that could go")
    return sizes


def _worth(
    decoder: Decoder,
    kind: Kind,
    calibration: Calibration,
    how: Shrinking,
    on_progress: Progress,
    ledger: Path | None,
) -> Scores:
    sizes = _sizes(decoder, kind)
    if how.by == "random":
        generator = torch.Generator().manual_seed(how.seed)
        return {layer: torch.rand(n, generator=generator) for layer, n in sizes.items()}
    if how.by == "magnitude":
        return {i: _magnitude(decoder.layers[i], kind, n) for i, n in sizes.items()}
    if how.by == "activation":
        return _activation(decoder, kind, calibration, on_progress)
    question = Question(units=("neurons:1" if kind == "neurons" else kind,), effect="kl")
    estimator = Estimator(seed=how.seed, max_batch_tokens=how.max_batch_tokens)
    if kind == "neurons":
        estimator = replace(estimator, name="gradient")
    else:
        some = tuple(few(calibration.examples))
        calibration = Calibration(some, (0,) * len(some))
    effects = attribute(decoder, calibration, question, estimator, ledger=ledger, on_progress=on_progress)
    values = effects.change_nats() if effects.predicted_nats is None else effects.predicted_nats
    by_layer = torch.tensor([unit.layer for unit in effects.units])
    return {layer: values.sum(1)[by_layer == layer] for layer in sizes}


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
    """Return the sum of squares of the weights of every unit of a layer."""
    found = torch.zeros(n)
    for p in layer.projections:
        squares, dense = p.read().float().square(), p.name.count(".") == 2
        if kind == "layers":
            found += squares.sum().cpu()
        elif kind == "experts" and p.place == "experts":
            found[int(p.name.split(".")[3])] += squares.sum().cpu()
        elif dense and (
            (kind == "kv_groups" and p.blocks) or (kind == "neurons" and p.role in ("gate", "up", "down"))
        ):
            found += squares.sum(0 if p.role in ("o", "down") else 1).view(n, -1).sum(1).cpu()
    return found


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
