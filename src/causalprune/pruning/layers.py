"""Stage 3 of the method, and the baselines: score, budget, keep, update. The only writer of weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    Masks,
    ModelError,
    OptionError,
    Progress,
    Projection,
    State,
    bar,
    silent,
    unpacked,
)
from causalprune.interventions import output_slopes
from causalprune.models import fingerprint
from causalprune.pruning.allocation import find_threshold, keep_above, keep_columns, prune_counts
from causalprune.pruning.budgets import measured_response, shares_of
from causalprune.pruning.criteria import LOOKS, Update
from causalprune.pruning.grading import DoseResponse
from causalprune.pruning.importance import head_factors
from causalprune.pruning.methods import Method, pattern_sparsity
from causalprune.pruning.obs import Choose, incomplete, refit, sparsegpt
from causalprune.pruning.pruned import Pruned
from causalprune.pruning.scores import finite, inverse, score, score_blocks, slope
from causalprune.pruning.training import Lesson, distill, lessons, rounds
from causalprune.pruning.walks import Gathered, Plan, Steps, planned, unrouted, walk


def prune(  # noqa: PLR0913 (the command's options)
    decoder: Decoder,
    method: Method,
    *,
    calibration: Calibration | None = None,
    effects: Effects | None = None,
    max_batch_tokens: int = 2048,
    kept_in: Path | None = None,
    on_progress: Progress | None = None,
) -> Pruned:
    """Set the least important weights of the decoder to exactly zero, in place, and update the others.

    Criteria that look at inputs go layer by layer, with inputs from already pruned layers; under scope
    `global` all scores must exist before the first weight goes, so there the inputs are the intact model's,
    and only updates see pruned ones. Costs about two forward passes over the calibration tokens for each walk
    through the layers, and for updates `out · in²` multiplications for every matrix, some times over; see
    `training.distill` for what that costs. What takes long is kept in the file `kept_in` as soon as it is finished (training every ten
    minutes): a stopped run that begins again with the same arguments goes on from there. The caller removes the file.
    Where no `on_progress` is given, a bar shows how far it has come (`silent`: nothing does).

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
    if kept_in and (method.takes_long or kept_in.exists()):  # a fingerprint reads the whole model
        data, measured = calibration and calibration.fingerprint, effects and effects.fingerprint
        identity = [fingerprint(decoder.model), asdict(method), data, measured, max_batch_tokens]
    state = State(kept_in, identity)
    stopped = "training" in state.values  # all layers had been pruned
    followed = _followed(decoder, method, calibration, max_batch_tokens)
    examples = None if stopped else calibration
    plan = planned(decoder, method, factors, examples, max_batch_tokens, _epochs(followed))
    with bar(on_progress, "pruning") as tell:
        steps = Steps(plan.total, tell)
        pruned = _restored(plan, state.values) if stopped else _pruned(plan, steps, state)
        if followed is not None:
            response = pruned.response and asdict(pruned.response)
            state.values |= {"keep": pruned.keep.stored(), "unrouted": pruned.unrouted, "response": response}
            on_step = partial(steps.part, plan.total)
            distill(decoder, pruned.keep, followed, seed=method.seed, on_step=on_step, state=state)
    return pruned


@dataclass(frozen=True, eq=False)
class Repair:
    """What makes up for weights that go: an update on calibration data, and what training follows instead of this model."""

    calibration: Calibration
    update: Update = "refit"
    followed: Sequence[Lesson] = ()
    seed: int = 0
    max_batch_tokens: int = 2048


def remove(
    decoder: Decoder,
    keep: Mapping[str, Bool[Tensor, "_ _"]],
    repair: Repair,
    on_progress: Progress = silent,
) -> None:
    """Set all weights to zero but those that `keep` names, in place, and update the others on calibration data.

    Matrices that lose nothing are updated by `distill` alone, on what is `followed`, or else this model as it is. Costs as in `prune`.

    Raises:
        ModelError: a weight or an input is not finite, or inputs say too little for an update.
    """
    pool, data, size = decoder.projections, repair.calibration, repair.max_batch_tokens
    share = sum(int((~keep[p.name]).sum()) for p in pool) / sum(p.size for p in pool)
    _check(decoder)
    if share:
        method = Method("magnitude", share, seed=repair.seed, update=repair.update)
        followed = _followed(decoder, method, data, size, repair.followed)
        plan = planned(decoder, method, {}, data, size, _epochs(followed))
        steps = Steps(plan.total, on_progress)
        for _ in prune_layers(plan, Gathered(), steps, fixed=iter([keep[p.name] for p in pool])):
            pass
        if followed is not None:
            distill(decoder, keep, followed, seed=repair.seed, on_step=partial(steps.part, plan.total))
    elif repair.followed:
        distill(decoder, keep, repair.followed, seed=repair.seed, on_step=on_progress)


def _followed(
    decoder: Decoder,
    method: Method,
    calibration: Calibration | None,
    max_batch_tokens: int,
    known: Sequence[Lesson] = (),
) -> Sequence[Lesson] | None:
    """Return what training follows, None where the update is another one."""
    if method.resolved_update != "distill":
        return None
    if known or calibration is None:
        return known
    return lessons(decoder, calibration.examples, max_batch_tokens)


def _epochs(followed: Sequence[Lesson] | None) -> int:
    return 0 if followed is None else rounds(followed)


def _restored(plan: Plan, known: Mapping[str, Any]) -> Pruned:
    """Return what a stopped run had kept, all of whose layers were pruned."""
    keep = Masks()
    for p in plan.decoder.projections:
        keep.add(p.name, unpacked(known["keep"][p.name].numpy(), p.shape).to(p.device))
    curves = DoseResponse(**known["response"]) if known["response"] else None
    return Pruned(plan.method, keep, known["unrouted"], curves)


def _pruned(plan: Plan, steps: Steps, state: State) -> Pruned:
    """Look at calibration data where the method has to, prune all layers, and return what stayed."""
    gathered = Gathered()
    if "slopes" in plan.method.needs:
        if "slopes" not in state.values:
            found = output_slopes(plan.decoder, plan.groups, partial(steps.part, plan.back))
            state.keep(slopes=found)
        gathered.slopes, steps.done = state.values["slopes"], plan.back
    response = measured_response(plan, gathered, steps, state)
    shares = None if response is None else shares_of(plan, response)
    keep = Masks()
    for p, kept in prune_layers(plan, gathered, steps, shares=shares):
        keep.add(p.name, kept)
    return Pruned(plan.method, keep, unrouted(plan, gathered), response)


def prune_layers(
    plan: Plan,
    gathered: Gathered,
    steps: Steps,
    *,
    shares: Sequence[float] | None = None,
    fixed: Iterator[Tensor] | None = None,
) -> Iterator[tuple[Projection, Tensor]]:
    """Prune layer by layer, and yield each matrix with what stays of it.

    All matrices lose the same share, or their own of `shares`; what stays may be `fixed` already, matrix after matrix.
    """
    method, pool = plan.method, plan.decoder.projections
    if fixed is None and method.resolved_scope == "global":
        fixed = _keep_globally(plan, gathered, steps)
    if fixed is not None and method.walks:
        fixed = iter(list(fixed))  # scores are about the intact model: none may wait for pruned inputs
    counts = prune_counts([p.size for p in pool], shares or method.sparsity)
    by_name = {p.name: count for p, count in zip(pool, counts, strict=True)}
    looks = fixed is None and bool(method.needs & LOOKS)
    moments = method.resolved_update != "none" or (looks and "moments" in method.needs)
    walked = walk(plan, gathered, steps, advance_pruned=True, moments=moments) if looks or moments else None
    for layer in walked or plan.decoder.layers:
        for p in layer.projections:
            choose = partial(keep_columns, method.resolved_scope, by_name[p.name], p.shape)
            weight, keep = _solved(plan, gathered, p, choose, None if fixed is None else next(fixed))
            if weight is None:
                p.erase(keep)
            else:
                p.write(torch.where(keep, weight, weight.new_zeros(())))
            yield p, keep
        if not method.walks:
            steps.add()


def _keep_globally(plan: Plan, gathered: Gathered, steps: Steps) -> Iterator[Tensor]:
    """Rank all weights by what the intact model's inputs say, and yield what stays of matrix after matrix."""
    needs, pool = plan.method.needs, plan.decoder.projections
    kept: dict[str, Tensor] = {}
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
    plan: Plan, gathered: Gathered, p: Projection, choose: Choose, keep: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Return the weights of a matrix after the update, if it had any, and what stays: `keep` where it is known."""
    method, moments, weight, solved = plan.method, gathered.moments, p.read(), None
    if keep is None and "moments" in method.needs:
        rows, upper = slope(plan, gathered, p), inverse(plan, gathered, p)
        solved, keep = sparsegpt(weight, upper, choose, group=method.group, rows=rows)
    stays = choose(score(plan, gathered, p), 0) if keep is None else keep
    update = method.resolved_update
    if update == "none" or not moments.tokens.get(p.name) or not incomplete(stays):
        return None, stays
    if update != "obs":
        return refit(weight, stays, finite(p, moments.hessians[p.name])), stays
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
