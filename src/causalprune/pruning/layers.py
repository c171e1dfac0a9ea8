"""Stage 3 of the method, and the baselines: score, budget, keep, update. The only writer of weights."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalprune.calibration import batches, few
from causalprune.core import (
    Batch,
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
    bands,
    silent,
    unpacked,
)
from causalprune.interventions import (
    InputNorms,
    LayerInputs,
    Moments,
    capture,
    observed,
    output_slopes,
    run_layer,
)
from causalprune.models import fingerprint
from causalprune.pruning.allocation import (
    dense_shares,
    find_threshold,
    graded_shares,
    keep_above,
    keep_columns,
    prune_counts,
)
from causalprune.pruning.criteria import CRITERIA, LOOKS, Evidence, Update
from causalprune.pruning.grading import DoseResponse, dose_response
from causalprune.pruning.importance import Factors, head_factors
from causalprune.pruning.methods import SLOPE_PASSES, Method, pattern_sparsity
from causalprune.pruning.obs import incomplete, inverse_factor, refit, sparsegpt
from causalprune.pruning.pruned import Pruned
from causalprune.pruning.training import Lesson, distill, lessons, rounds


def prune(  # noqa: PLR0913 (the command's options)
    decoder: Decoder,
    method: Method,
    *,
    calibration: Calibration | None = None,
    effects: Effects | None = None,
    max_batch_tokens: int = 2048,
    kept_in: Path | None = None,
    on_progress: Progress = silent,
) -> Pruned:
    """Set the least important weights of the decoder to exactly zero, in place, and update the others.

    Criteria that look at inputs go layer by layer, with inputs from already pruned layers; under scope
    `global` all scores must exist before the first weight goes, so there the inputs are the intact model's,
    and only updates see pruned ones. Costs about two forward passes over the calibration tokens for each walk
    through the layers, and for updates `out · in²` multiplications for every matrix, some times over; see
    `distillation.distill` for what that costs. What takes long is kept in the file `kept_in` as soon as it is finished (training every ten
    minutes): a stopped run that begins again with the same arguments goes on from there. The caller removes the file.

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
        examples, measured = calibration and calibration.fingerprint, effects and effects.fingerprint
        identity = [fingerprint(decoder.model), asdict(method), examples, measured, max_batch_tokens]
    work = Work(decoder, method, factors, on_progress, State(kept_in, identity))
    return _carried_out(work, calibration, max_batch_tokens)


def remove(  # noqa: PLR0913 (what `prune` takes)
    decoder: Decoder,
    keep: Mapping[str, Bool[Tensor, "_ _"]],
    calibration: Calibration,
    *,
    update: Update = "refit",
    followed: Sequence[Lesson] = (),
    seed: int = 0,
    max_batch_tokens: int = 2048,
    on_progress: Progress = silent,
) -> None:
    """Set all weights to zero but those that `keep` names, in place, and update the others on calibration data.

    Matrices that lose nothing are updated by `distill` alone, on what is `followed`, or else this model as it is. Costs as in `prune`.

    Raises:
        ModelError: a weight or an input is not finite, or inputs say too little for an update.
    """
    pool = decoder.projections
    share = sum(int((~keep[p.name]).sum()) for p in pool) / sum(p.size for p in pool)
    _check(decoder)
    if share:
        work = Work(decoder, Method("magnitude", share, seed=seed, update=update), {}, on_progress)
        _carried_out(work, calibration, max_batch_tokens, iter([keep[p.name] for p in pool]), followed)
    elif followed:
        distill(decoder, keep, followed, seed=seed, on_step=on_progress)


def _carried_out(
    work: "Work",
    calibration: Calibration | None,
    max_batch_tokens: int,
    fixed: Iterator[Tensor] | None = None,
    followed: Sequence[Lesson] = (),
) -> Pruned:
    """Prune all layers, train on the intact model's predictions if that is the update, and return what stayed."""
    decoder, method, keep, known = work.decoder, work.method, Masks(), work.state.values
    trains = method.resolved_update == "distill"
    if trains and not followed and calibration is not None:
        followed = lessons(decoder, calibration.examples, max_batch_tokens)
    if trains:  # a walk is two forward passes, an epoch three
        work.total += round(3 / 2 * rounds(followed) * len(decoder.layers))
    if "training" in known:  # of a stopped run, which had pruned all layers
        for p in decoder.projections:
            keep.add(p.name, unpacked(known["keep"][p.name].numpy(), p.shape).to(p.device))
        curves = DoseResponse(**known["response"]) if known["response"] else None
        pruned = Pruned(method, keep, known["unrouted"], curves)
    else:
        if method.needs_calibration and calibration is not None:
            work.look_at(calibration, max_batch_tokens)
        for p, kept in work.prune_layers(fixed):
            keep.add(p.name, kept)
        pruned = Pruned(method, keep, work.unrouted(), work.response)
    if trains:
        response = pruned.response and asdict(pruned.response)
        known |= {"keep": keep.stored(), "unrouted": pruned.unrouted, "response": response}
        on_step = partial(work.report_part, work.total)
        distill(decoder, keep, followed, seed=method.seed, on_step=on_step, state=work.state)
    return pruned


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


class Work:
    """The loops of one pruning run, and what it has seen of the inputs."""

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        factors: Factors,
        on_progress: Progress,
        state: State | None = None,
    ) -> None:
        self.decoder, self.method, self.factors, self.state = decoder, method, factors, state or State()
        self.groups: list[Batch] = []
        self.few: list[Batch] = []  # for graded interventions
        self.hold: Callable[[LayerInputs], LayerInputs] = lambda inputs: inputs
        """Gets the inputs of layers, and returns them from wherever it keeps them until the layer runs."""
        self.response: DoseResponse | None = None
        self.norms = InputNorms()
        self.slopes: Mapping[str, Tensor] = {}
        self.moments = Moments()  # of the layer at hand
        self.needs = method.needs
        self._factor: tuple[Tensor, Tensor] | None = None
        self._done, self._on_progress = 0, on_progress
        self._back = round(SLOPE_PASSES / 2 * len(decoder.layers)) if "slopes" in self.needs else 0
        self._trials = [0] * len(decoder.layers)  # of graded budgets
        self.total = self._back + max(method.walks, 1) * len(decoder.layers)

    def look_at(self, calibration: Calibration, max_batch_tokens: int) -> None:
        """Let the walks see calibration data, and take gradients on it where scores need them."""
        unpadded = any(isinstance(layer.experts, nn.ModuleList) for layer in self.decoder.layers)
        size = 1 if unpadded else max_batch_tokens
        self.groups = batches(calibration.examples, max_batch_tokens=size)
        self.few = batches(few(calibration.examples), max_batch_tokens=size)
        part = sum(len(b.tokens) for b in self.few) / len(calibration.examples)
        self._trials = [round(self.method.trials * part * n / 2) for n in range(len(self._trials), 0, -1)]
        self.total += sum(self._trials)
        if "slopes" in self.needs:
            if "slopes" not in self.state.values:
                found = output_slopes(self.decoder, self.groups, partial(self.report_part, self._back))
                self.state.keep(slopes=found)
            self.slopes, self._done = self.state.values["slopes"], self._back

    def unrouted(self) -> tuple[str, ...]:
        """Return the projections that no token of the calibration reached."""
        tokens = self.norms.tokens
        return tuple(p.name for p in self.decoder.projections if self.groups and not tokens.get(p.name))

    def keep_globally(self) -> Iterator[Tensor]:
        """Rank all weights by what the intact model's inputs say, and yield what stays of matrix after matrix."""
        kept: dict[str, Tensor] = {}
        if self.needs & LOOKS:
            for layer in self.walk(advance_pruned=False, moments="moments" in self.needs):
                if "moments" in self.needs:
                    kept |= {p.name: self.score(p) for p in layer.projections}
        pool = self.decoder.projections

        def scores(p: Projection) -> Iterator[Tensor]:
            return iter([kept[p.name]]) if kept else self.score_blocks(p)

        count = prune_counts([sum(p.size for p in pool)], self.method.sparsity)[0]
        every = partial(map, scores, pool)
        threshold = find_threshold(lambda: chain.from_iterable(every()), count)
        for p in pool:
            parts = []
            for score in scores(p):
                keep, threshold = keep_above(score, threshold)
                parts.append(keep)
            yield torch.cat(parts)

    def prune_layers(self, fixed: Iterator[Tensor] | None = None) -> Iterator[tuple[Projection, Tensor]]:
        """Prune layer by layer, and yield each matrix with what stays of it, which may be `fixed` already."""
        if fixed is None and self.method.resolved_scope == "global":
            fixed = self.keep_globally()
        if fixed is not None and self.method.walks:
            fixed = iter(list(fixed))  # scores are about the intact model: none may wait for pruned inputs
        pool, update = self.decoder.projections, self.method.resolved_update
        shares = self._shares() if fixed is None else None
        counts = prune_counts([p.size for p in pool], shares or self.method.sparsity)
        by_name = {p.name: count for p, count in zip(pool, counts, strict=True)}
        looks = fixed is None and bool(self.needs & LOOKS)
        moments = update != "none" or (looks and "moments" in self.needs)
        layers = self.walk(advance_pruned=True, moments=moments) if looks or moments else None
        for layer in layers or self.decoder.layers:
            for p in layer.projections:
                choose = partial(keep_columns, self.method.resolved_scope, by_name[p.name], p.shape)
                weight, keep = self._solved(p, choose, None if fixed is None else next(fixed))
                if weight is None:
                    p.erase(keep)
                else:
                    p.write(torch.where(keep, weight, weight.new_zeros(())))
                yield p, keep
            if not self.method.walks:
                self._report()

    def _shares(self) -> list[float] | None:
        """Return the sparsity of every matrix by graded interventions, None where all have the same."""
        if self.method.resolved_budgets == "uniform":
            return None
        layers = self.walk(advance_pruned=False, moments="moments" in self.needs)
        wanted, pattern = self.method.sparsity, pattern_sparsity(self.method.resolved_scope)
        tried, fused = self.method.doses, pattern is not None
        found = dose_response(
            self.decoder, layers, self.few, tried, self._tried, fused=fused, state=self.state
        )
        self.response = found
        if pattern is not None:
            shares = dense_shares(found.nats[:, 0], found.sizes, pattern, wanted)
        else:
            shares = graded_shares(found.nats, found.sparsities, found.sizes, wanted).tolist()
        by_name = {name: share for group, share in zip(found.members, shares, strict=True) for name in group}
        return [by_name[p.name] for p in self.decoder.projections]

    def _tried(self, p: Projection, sparsities: Sequence[float]) -> Sequence[Float[Tensor, "out in"]]:
        """Return a matrix of the intact model pruned alone to each sparsity, with no update but the criterion's own.

        SparseGPT goes through the columns once, for all sparsities side by side.
        """
        scope, times = self.method.resolved_scope, len(sparsities)
        counts = [round(sparsity * p.size) for sparsity in sparsities]
        choices = [partial(keep_columns, scope, count, p.shape) for count in counts]
        if "moments" not in self.needs:
            score = self.score(p)
            return [torch.where(choose(score, 0), p.read(), 0.0) for choose in choices]

        def choose_all(score: Tensor, start: int) -> Tensor:
            parts = zip(choices, score.chunk(times), strict=True)
            return torch.cat([choose(part, start) for choose, part in parts])

        many, slope = p.read().repeat(times, 1), self._slope(p)
        rows = None if slope is None else slope.repeat(times)
        found, _ = sparsegpt(many, self._inverse(p), choose_all, group=self.method.group, rows=rows)
        return found.to(p.parameter.dtype).chunk(times)

    def _solved(
        self, p: Projection, choose: Callable[[Tensor, int], Tensor], keep: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Return the weights of a matrix after the update, if it had any, and what stays: `keep` where it is known."""
        weight, update, solved = p.read(), self.method.resolved_update, None
        if keep is None and "moments" in self.needs:
            rows, upper = self._slope(p), self._inverse(p)
            solved, keep = sparsegpt(weight, upper, choose, group=self.method.group, rows=rows)
        stays = choose(self.score(p), 0) if keep is None else keep
        if update == "none" or not self.moments.tokens.get(p.name) or not incomplete(stays):
            return None, stays
        if update != "obs":
            return refit(weight, stays, self._finite(p, self.moments.hessians[p.name])), stays
        if solved is None:
            solved, _ = sparsegpt(weight, self._inverse(p), lambda s, at: stays[:, at : at + s.shape[1]])
        return solved, stays

    def score_blocks(self, p: Projection) -> Iterator[Float[Tensor, "rows in"]]:
        """Yield what the weights of a projection are worth: some rows at a time where they can be scored by value."""
        if not CRITERIA[self.method.criterion].by_value:
            yield self.score(p)
            return
        weight, factor = p.read(), self.factors.get(p.name)
        for band in bands(weight):
            own = factor if factor is None or len(factor) == 1 else factor[band]
            score = CRITERIA[self.method.criterion].score(weight[band], Evidence(factor=own))
            yield self._finite(p, score)

    def score(self, p: Projection) -> Float[Tensor, "out in"]:
        """Return what the weights of a projection are worth, by the method's criterion."""
        weight, norm, inverse = p.read(), None, None
        if "inputs" in self.needs:
            norm = self._known(p, self.norms.root_mean_square).expand(weight.shape[1])
        if "moments" in self.needs:
            inverse = self._inverse(p).square().sum(0)
        evidence = Evidence(
            input_norm=norm,
            output_slope=self._slope(p),
            inverse=inverse,
            factor=self.factors.get(p.name),
            seed=zlib.crc32(f"{self.method.seed}:{p.name}".encode()),
        )
        return self._finite(p, CRITERIA[self.method.criterion].score(weight, evidence))

    def _slope(self, p: Projection) -> Float[Tensor, "out"] | None:
        """Return the root mean square of the gradient at the outputs, None where rows are not compared by it."""
        if not self.slopes:
            return None
        return self._known(p, lambda q: self.slopes.get(q.name)).float().expand(p.shape[0])

    def _known(self, p: Projection, of: Callable[[Projection], Tensor | None]) -> Float[Tensor, "#features"]:
        """Return what is known of a projection's inputs or outputs.

        For an expert that no token reached that is one number, the root mean square over its siblings: it is neither
        free nor worth more than they are. One where nothing is known of them either.
        """
        if (own := of(p)) is not None:
            return own
        siblings = self.decoder.layers[p.layer].projections
        found = [vector for q in siblings if q.role == p.role and (vector := of(q)) is not None]
        known = torch.cat(found).square().mean().sqrt() if found else torch.ones(())
        return known.to(p.device).view(1)

    def _finite(self, p: Projection, score: Tensor) -> Tensor:
        if not bool(torch.isfinite(score.amax())):  # which is NaN if any is
            raise ModelError(f"{p.parameter_name} ({p.name}) has inputs or factors that are not finite")
        return score

    def _inverse(self, p: Projection) -> Float[Tensor, "in in"]:
        """Return the factor of the inverse second moments, made once for projections that share inputs."""
        seen, tokens = self.moments.hessians, self.moments.tokens
        hessian = seen.get(p.name)
        if hessian is None or not tokens.get(p.name):  # an expert that no token reached
            known = self._known(p, lambda q: seen[q.name].diagonal() if tokens.get(q.name) else None)
            hessian = known.float().expand(p.shape[1]).diag()
        if self._factor is None or self._factor[0] is not hessian:
            self._factor = hessian, inverse_factor(hessian, self.method.damping, p.parameter_name)
        return self._factor[1]

    def walk(self, *, advance_pruned: bool, moments: bool) -> Iterator[Layer]:
        """Yield layer after layer, what its projections see gathered in `norms` and `moments`.

        With `advance_pruned` each layer runs once more after the caller has pruned it, so that the next layer
        sees the inputs it will have; otherwise the outputs of the first run go on.
        """
        decoder, groups = self.decoder, self.groups
        inputs = [self.hold(capture(decoder, batch.tokens, stop=0)) for batch in groups]
        self.norms, self.moments = InputNorms(), Moments()
        for layer in decoder.layers:
            for number, batch in enumerate(groups):
                own = inputs[number]
                with observed(layer, batch.real, self._see if moments else self.norms.see):
                    hidden = run_layer(decoder, batch.tokens, layer.index, own)
                if not advance_pruned:
                    inputs[number] = self.hold(LayerInputs({layer.index + 1: hidden}, own.as_tuple))
            yield layer
            self.moments, self._factor = Moments(), None  # room for what the layer holds while it runs
            if advance_pruned:
                for number, batch in enumerate(groups):
                    own = inputs[number]
                    hidden = run_layer(decoder, batch.tokens, layer.index, own)
                    inputs[number] = self.hold(LayerInputs({layer.index + 1: hidden}, own.as_tuple))
            self._report(1 if advance_pruned else 1 + self._trials[layer.index])

    def _report(self, units: int = 1) -> None:
        self._done += units
        self._on_progress(self._done, self.total)

    def report_part(self, stop: int, done: int, total: int) -> None:
        """Report a part of the work up to `stop`, of which `done` of `total` steps are done."""
        self._on_progress(self._done + (stop - self._done) * done // total, self.total)

    def _see(self, projection: Projection, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        self.norms.see(projection, inputs, outputs, real)
        self.moments.see(projection, inputs, outputs, real)
