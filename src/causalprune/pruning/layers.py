"""Stage 3 of the method, and the baselines: score, budget, keep, update. The only writer of weights."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from causalprune.core import (
    Calibration,
    Decoder,
    Effects,
    Layer,
    Masks,
    ModelError,
    OptionError,
    Progress,
    Projection,
    State,
    bar,
    packed,
    silent,
    unpacked,
)
from causalprune.interventions import LayerInputs, as_they_are, output_slopes, weight_slopes
from causalprune.models import fingerprint
from causalprune.pruning.allocation import find_threshold, keep_above, keep_columns, prune_counts
from causalprune.pruning.budgets import measured_response, shares_of
from causalprune.pruning.criteria import LOOKS, SENSITIVE, TRAINS, Update
from causalprune.pruning.grading import DoseResponse
from causalprune.pruning.importance import head_factors
from causalprune.pruning.methods import Method, pattern_sparsity
from causalprune.pruning.obs import Choose, incomplete, refit, sparsegpt
from causalprune.pruning.parts import Steps
from causalprune.pruning.pruned import Pruned
from causalprune.pruning.rules import RULES
from causalprune.pruning.scores import finite, inverse, score, score_blocks, slope
from causalprune.pruning.stacks import Solved, Stacks
from causalprune.pruning.training import Around, Lesson, Training, as_kept, check_dtypes, distill, lessons
from causalprune.pruning.walks import Gathered, Plan, planned, unrouted, walk


def prune(  # noqa: PLR0913 (the command's options)
    decoder: Decoder,
    method: Method,
    *,
    calibration: Calibration | None = None,
    effects: Effects | None = None,
    max_batch_tokens: int = 2048,
    kept_in: Path | str | None = None,
    on_progress: Progress | None = None,
) -> Pruned:
    """Set the least important weights of the decoder to exactly zero, in place, and update the others.

    Criteria that look at inputs go layer by layer, with inputs from already pruned layers; under scope
    `global` all scores must exist before the first weight goes, so there the inputs are the intact model's,
    and only updates see pruned ones. Costs about two forward passes over the calibration tokens for each walk
    through the layers, and for updates `out · in²` multiplications for every matrix, some times over; see
    `training.distill` for what that costs. What takes long is kept in the folder `kept_in` as soon as it is finished, and
    training on the way: a stopped run that begins again with the same arguments goes on from there, and ends with the
    same weights. The caller removes it (`core.forget`). Where no `on_progress` is given, a bar shows how far it has
    come (`silent`: nothing does).

    Raises:
        OptionError: calibration or effects are missing, or a matrix has not the multiple of inputs that a pattern needs.
        MismatchError: the effects were measured on another model, or `kept_in` is of another pruning.
        ModelError: a weight or an input is not finite, or inputs say too little for an update.
    """
    if method.needs_calibration and calibration is None:
        raise OptionError(f"method {method.criterion!r} needs calibration data")
    factors = head_factors(decoder, effects, fingerprint(decoder.model)) if "effects" in method.needs else {}
    _check(decoder, method.group if pattern_sparsity(method.resolved_scope) else 1)
    identity: list[object] = []
    place = Path(kept_in) if kept_in and (method.takes_long or Path(kept_in).exists()) else None
    if place is not None:  # a fingerprint reads the whole model
        data, measured = calibration and calibration.fingerprint, effects and effects.fingerprint
        identity = [fingerprint(decoder.model), asdict(method), data, measured, max_batch_tokens]
    plan = planned(decoder, method, factors, calibration, max_batch_tokens)
    plan = replace(plan, state=State(place, identity))
    with bar(on_progress, "pruning") as tell:
        pruned, _ = carry_out(plan, Steps(plan.costs, tell), calibration, max_batch_tokens)
    looked_at = calibration if method.needs_calibration else None
    return replace(pruned, calibration=looked_at, effects=effects if "effects" in method.needs else None)


def carry_out(
    plan: Plan,
    steps: Steps,
    calibration: Calibration | None,
    max_batch_tokens: int,
    around: Around | None = None,
) -> tuple[Pruned, int]:
    """Do what is planned, and return what stayed and how many training steps there were; see `training` for `around`."""
    state, method, trained = plan.state, plan.method, 0
    stopped = bool({"training", "trained"} & state.values.keys())  # all layers had been pruned
    followed = _followed(plan, steps, calibration, max_batch_tokens)
    pruned = _restored(plan, state.values) if stopped else _pruned(plan, steps)
    state.flush()
    if followed is not None:
        response = pruned.response and asdict(pruned.response)
        if not stopped:
            state.keep(keep=pruned.keep.stored(), unrouted=pruned.unrouted, response=response)
        steps.begin("training", "steps")
        hold = plan.hold or as_they_are
        how = Training(
            RULES[method.resolved_update], method.seed, hold, around, () if around else _every(plan.decoder)
        )
        trained = distill(plan.decoder, followed, how=how, on_step=steps.tell, state=state)
    return pruned, trained


@dataclass(frozen=True, eq=False)
class Repair:
    """What makes up for weights that go: an update on calibration data."""

    calibration: Calibration
    update: Update = "refit"
    seed: int = 0
    max_batch_tokens: int = 2048


def remove(
    decoder: Decoder,
    keep: Mapping[str, Bool[Tensor, "_ _"]],
    repair: Repair,
    on_progress: Progress = silent,
    state: State | None = None,
    besides: Callable[[], None] = lambda: None,
) -> None:
    """Set all weights to zero but those that `keep` names, in place, and update the others on calibration data.

    What goes `besides`, as a bias, goes once it is known what training follows. Matrices that lose nothing are updated by training alone. Costs as in `prune`, and goes on from the `state` as that does.

    Raises:
        ModelError: a weight or an input is not finite, or inputs say too little for an update.
    """
    pool, data, size = decoder.projections, repair.calibration, repair.max_batch_tokens
    share = sum(int((~keep[p.name]).sum()) for p in pool) / sum(p.size for p in pool)
    _check(decoder)
    state = state or State()
    if share:
        method = Method("magnitude", share, seed=repair.seed, update=repair.update)
        plan = replace(planned(decoder, method, {}, data, size), state=state)
        steps = Steps(plan.costs, on_progress)
        stopped = bool({"training", "trained"} & state.values.keys())  # all layers had been pruned
        followed = _followed(plan, steps, data, size)
        besides()
        fixed = iter([keep[p.name] for p in pool])
        for _ in () if stopped else prune_layers(plan, Gathered(), steps, fixed=fixed):
            pass
        state.flush()
        if followed is not None:
            steps.begin("training", "steps")
            how = Training(RULES[method.resolved_update], repair.seed, outdated=_every(decoder))
            distill(decoder, followed, how=how, on_step=steps.tell, state=state)


def _followed(
    plan: Plan, steps: Steps, calibration: Calibration | None, max_batch_tokens: int
) -> Sequence[Lesson] | None:
    """Return what training follows, None where the update is another one."""
    if plan.method.resolved_update not in TRAINS or calibration is None:
        return None
    check_dtypes(plan.decoder)  # before anything that takes time
    if plan.taught and "lessons" not in plan.state.values:
        _look_back(plan, steps)
    steps.begin("predictions", "batches" if plan.hold is None else "layers")
    examples, hold = calibration.examples, plan.hold
    return lessons(plan.decoder, examples, max_batch_tokens, plan.state, steps.tell, hold)


def _restored(plan: Plan, known: Mapping[str, Any]) -> Pruned:
    """Return what a stopped run had kept, all of whose layers were pruned."""
    keep = Masks()
    for p in plan.decoder.projections:
        keep.add(p.name, unpacked(known["keep"][p.name].numpy(), p.shape).to(p.device))
    curves = DoseResponse(**known["response"]) if known["response"] else None
    return Pruned(plan.method, keep, known["unrouted"], curves)


def _pruned(plan: Plan, steps: Steps) -> Pruned:
    """Look at calibration data where the method has to, prune all layers, and return what stayed."""
    gathered, state = Gathered(), plan.state
    if "slopes" in plan.method.needs:
        if "slopes" not in state.values:
            _look_back(plan, steps)
        places = {p.name: p.device for p in plan.decoder.projections}
        gathered.slopes = {name: own.to(places[name]) for name, own in state.values["slopes"].items()}
    if wanted := plan.method.needs & SENSITIVE:
        steps.begin("gradients", "batches")
        relevant = "relevance" in wanted
        gathered.gradients = weight_slopes(
            plan.decoder, plan.groups, relevant=relevant, on_progress=steps.tell
        )
    response = measured_response(plan, gathered, steps)
    shares = None if response is None else shares_of(plan, response)
    keep = Masks()
    for p, kept in prune_layers(plan, gathered, steps, shares=shares):
        keep.add(p.name, kept)
    return Pruned(plan.method, keep, unrouted(plan, gathered), response)


def _look_back(plan: Plan, steps: Steps) -> None:
    """Keep slopes at outputs, and where batches are `taught` what training will follow, from the same passes."""
    last, state, after = list[LayerInputs](), plan.state, len(plan.decoder.layers)
    steps.begin("gradients", "batches" if plan.hold is None else "layers")
    groups = plan.taught or plan.groups
    slopes = output_slopes(plan.decoder, groups, steps.tell, state, plan.hold, last)
    if plan.taught:
        state.keep(lessons=as_kept(last, after, len(groups)))
    state.keep(slopes=slopes)


def prune_layers(
    plan: Plan,
    gathered: Gathered,
    steps: Steps,
    *,
    shares: Sequence[float] | None = None,
    fixed: Iterator[Tensor] | None = None,
) -> Iterator[tuple[Projection, Tensor]]:
    """Prune layer by layer, and yield each matrix with what stays of it.

    All matrices lose the same share, or their own of `shares`; what stays may be `fixed` already, matrix after matrix. Layers
    that the plan's state has are not pruned again.
    """
    method, pool = plan.method, plan.decoder.projections
    if fixed is None and method.resolved_scope == "global":
        fixed = _keep_globally(plan, gathered, steps)
    if fixed is not None and method.walks:
        fixed = iter(list(fixed))  # scores are about the intact model: none may wait for pruned inputs
    counts = prune_counts([p.size for p in pool], shares or method.sparsity)
    choose: dict[str, Choose] = {
        p.name: partial(keep_columns, method.resolved_scope, count, p.shape)
        for p, count in zip(pool, counts, strict=True)
    }
    looks = fixed is None and bool(method.needs & LOOKS)
    moments = method.resolved_update != "none" or (looks and "moments" in method.needs)
    steps.begin("layers", "layers")
    plan.state.hold(layers=len(plan.decoder.layers))
    first = yield from _finished(plan, gathered, fixed)
    walks = looks or moments
    walked = walk(plan, gathered, steps, advance_pruned=True, moments=moments, first=first)
    for layer in walked if walks else plan.decoder.layers[first:]:
        kept = {}
        stacks = Stacks(plan, gathered, layer, choose, fixed)
        for p in layer.projections:
            weight, keep = _solved(plan, gathered, p, choose[p.name], stacks.take(p))
            if weight is None:
                p.erase(keep)
            else:
                p.write(torch.where(keep, weight, weight.new_zeros(())))
            if plan.state.path is not None:
                kept[p.name] = torch.from_numpy(packed(keep))
            yield p, keep
        if kept:
            plan.state.hold(**{_named(layer): _outcome(layer, kept, gathered)})
            if plan.hold is not None:  # the layer is about to leave memory
                plan.state.flush()
        if not walks:
            steps.tell(layer.index + 1, len(plan.decoder.layers))


def _outcome(layer: Layer, kept: Mapping[str, Tensor], gathered: Gathered) -> dict[str, Any]:
    """Return what pruning has made of a layer, which stays as it is until training begins."""
    weights = [parameter.data for parameter in _parameters(layer)]
    tokens = {p.name: gathered.norms.tokens.get(p.name, 0) for p in layer.projections}
    return {"weights": weights, "keep": kept, "tokens": tokens}


def _finished(
    plan: Plan, gathered: Gathered, fixed: Iterator[Tensor] | None
) -> Generator[tuple[Projection, Tensor], None, int]:
    """Put back the layers that a stopped run had pruned, yield what stays of them, and return the first that is not."""
    for layer in plan.decoder.layers:
        known = plan.state.values.pop(_named(layer), None)
        if known is None:
            return layer.index
        for parameter, weight in zip(_parameters(layer), known["weights"], strict=True):
            if plan.hold is None:  # else it is read when the layer runs
                parameter.data.copy_(weight)
        gathered.norms.tokens |= known["tokens"]
        for p in layer.projections:
            if fixed is not None:
                next(fixed)
            yield p, unpacked(known["keep"][p.name].numpy(), p.shape).to(p.device)
    return len(plan.decoder.layers)


def _named(layer: Layer) -> str:
    return f"layer-{layer.index}"


def _every(decoder: Decoder) -> list[str]:
    return [_named(layer) for layer in decoder.layers]


def _parameters(layer: Layer) -> list[torch.nn.Parameter]:
    return list(dict.fromkeys(p.parameter for p in layer.projections))


def _keep_globally(plan: Plan, gathered: Gathered, steps: Steps) -> Iterator[Tensor]:
    """Rank all weights by what the intact model's inputs say, and yield what stays of matrix after matrix."""
    needs, pool = plan.method.needs, plan.decoder.projections
    kept: dict[str, Tensor] = {}
    steps.begin("scores", "layers")
    if needs & LOOKS:
        for layer in walk(plan, gathered, steps, advance_pruned=False, moments="moments" in needs):
            if "moments" in needs:
                kept |= {p.name: score(plan, gathered, p) for p in layer.projections}

    def scores(p: Projection) -> Iterator[Tensor]:
        return iter([kept[p.name]]) if kept else score_blocks(plan, gathered, p)

    count = prune_counts([sum(p.size for p in pool)], plan.method.sparsity)[0]
    every = partial(map, scores, pool)
    threshold = find_threshold(lambda: chain.from_iterable(every()), count)
    for p in pool:
        parts = []
        for block in scores(p):
            keep, threshold = keep_above(block, threshold)
            parts.append(keep)
        yield torch.cat(parts)


def _solved(
    plan: Plan, gathered: Gathered, p: Projection, choose: Choose, done: Solved
) -> tuple[Tensor | None, Tensor]:
    """Return the weights of a matrix after the update, if it had any, and what stays.

    `done` is what SparseGPT has made of it together with others, and what stays, where that is known.
    """
    method, moments, weight, (solved, keep) = plan.method, gathered.moments, p.read(), done
    if keep is None and "moments" in method.needs:
        rows, upper = slope(plan, gathered, p), inverse(plan, gathered, p)
        solved, keep = sparsegpt(weight, upper, choose, group=method.group, rows=rows)
    stays = choose(score(plan, gathered, p), 0) if keep is None else keep
    update = method.resolved_update
    if update == "none" or not moments.tokens.get(p.name) or not incomplete(stays):
        return None, stays
    if update != "obs":
        return refit(weight, stays, finite(p, moments.hessians[p.name]), start=solved), stays
    if solved is None:
        upper = inverse(plan, gathered, p)
        solved, _ = sparsegpt(weight, upper, lambda s, at: stays[:, at : at + s.shape[1]])
    return solved, stays


def _check(decoder: Decoder, group: int = 1) -> None:
    if decoder.offloaded:
        raise ModelError(f"{decoder.name} is not all in memory: prune its files, with --stream")
    for p in decoder.projections:
        if not bool(torch.isfinite(p.read()).all()):
            raise ModelError(
                f"{p.parameter_name} ({p.name}) has weights that are not finite: load an intact copy"
            )
        if p.shape[1] % group:
            raise OptionError(
                f"a pattern of {group} needs a multiple of {group} inputs, and {p.name} has {p.shape[1]}"
            )
