"""Stage 1 of the method: how much the loss rises when a unit is removed (method §1).

Three estimators with one signature and one return type: `exact` measures every cell (unit, sequence),
`gradient` predicts all of them from a few backward passes, `adaptive` predicts all and measures some.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Set
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.attribution.measured import Measured
from causalprune.attribution.measuring import Passes
from causalprune.attribution.plan import Plan, opened, planned
from causalprune.attribution.questions import DEFAULT_BUDGET, Estimator, Question
from causalprune.attribution.sampling import Allocation, next_cells, settled
from causalprune.calibration import batches
from causalprune.core import Calibration, Decoder, Effects, MismatchError, Progress, Unit, bar, say, silent

Job: TypeAlias = tuple[int, int]  # a batch and a layer
LEAST = 0.01
"""Share of the largest sum over units below which a gate's own counts no more."""
ROUNDS = 4
"""Times that `adaptive` looks at what it has learnt and decides anew where to measure, in a budget."""
CERTAIN = 0.95
"""Share of the top fifth that has to be right, in expectation, for the ranking to be settled."""


def attribute(
    decoder: Decoder,
    calibration: Calibration,
    question: Question = Question(),
    estimator: Estimator = Estimator(),
    *,
    ledger: Path | str | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Measure or estimate the effect of every unit on every calibration sequence.

    With `ledger`, each finished job is on disk before the next begins: a killed run goes on where it was
    and returns the same values bit for bit (same machine, same number of threads).
    Where no `on_progress` is given, a bar shows how far it has come (`silent`: nothing does).
    """
    plan = planned(decoder, calibration, question, estimator)
    with opened(plan, ledger) as book, bar(on_progress, "attribution") as tell:
        say(tell, unit="tokens")
        jobs = None
        if estimator.name == "exact":
            jobs = len(share_of(exact_jobs(plan), *estimator.share)) + len(plan.groups)
        if book is not None and 0 < len(book.rows) != jobs:
            every = "" if jobs is None else f" of {jobs:,}"
            say(tell, note=f"going on: {len(book.rows):,}{every} jobs done")
        return ESTIMATORS[estimator.name](Measured(Passes(plan), book), tell)


def exact(work: Measured, on_progress: Progress = silent) -> Effects:
    """Measure every cell, layer by layer, from the cached input of the layer.

    Costs about half of one forward pass per unit and sequence: a masked pass skips the layers before.
    With a share of the jobs, the cells of the others stay unmeasured (NaN).
    """
    plan = work.plan
    costs = exact_jobs(plan)
    mine = share_of(costs, *plan.estimator.share)
    total, done = sum(costs[job] for job in mine), 0.0
    for number, layer in costs:
        if layer == 0:
            work.measure_intact(number)
        if (number, layer) not in mine:
            continue
        work.measure(f"{number}:{layer}", number, layer, cells_of(plan, (number, layer)))
        done += costs[number, layer]
        work.report(on_progress, round(done), round(total))
    return work.effects()


def exact_jobs(plan: Plan) -> dict[Job, float]:
    """Return the jobs of `exact`, every batch at every layer, with their cost in tokens."""
    jobs = itertools.product(range(len(plan.groups)), range(plan.depth))
    return {job: plan.cost(*job, len(cells_of(plan, job))) for job in jobs}


def cells_of(plan: Plan, job: Job) -> list[tuple[Unit, int]]:
    """Return the cells of a job: every unit of its layer, in every row of its batch."""
    number, layer = job
    rows = range(len(plan.groups[number].indices))
    return [(unit, row) for unit in plan.units_of(layer) for row in rows]


def share_of(costs: Mapping[Job, float], index: int, parts: int) -> Set[Job]:
    """Return the jobs of one of several parts: the longest first, each to the part with least to do."""
    loads, mine = [0.0] * parts, set()
    for job in sorted(costs, key=lambda job: -costs[job]):
        least = loads.index(min(loads))
        loads[least] += costs[job]
        if least == index - 1:
            mine.add(job)
    return mine


def gradient(work: Measured, on_progress: Progress = silent) -> Effects:
    """Predict every cell to first order (`ce`), with the Fisher term of second order where `draws` > 0.

    Costs `1 + 2 · (1 + draws)` forward passes per sequence and gate value, a backward counted as two.
    For `kl` only the second-order term exists: a divergence has no slope at the intact model. `relevance` has no second order,
    and neither has `ce` at several gates, which is an integral and no expansion (`planned` draws no labels).
    """
    plan, spent = work.plan, work.plan.expansion_tokens
    first, second = expanded(work, lambda done, all_: on_progress(round(spent * done / all_), round(spent)))
    predicted = second if plan.question.effect == "kl" else first + second
    if not plan.estimator.draws or plan.estimator.name == "relevance":
        return work.effects(spent, predicted_nats=predicted)
    return work.effects(spent, predicted_nats=predicted, curvature_nats=_curvature(plan, second))


def expanded(work: Measured, on_progress: Progress = silent) -> tuple[Tensor, Tensor]:
    """Return the first- and second-order parts of the prediction `[unit sequence]`, means over gates: of divergences `balanced` ones."""
    plan, how = work.plan, work.plan.estimator
    first, second = torch.zeros_like(work.masked), work.masked.new_zeros(len(how.gates), *work.masked.shape)
    groups = plan.groups
    if how.name == "adaptive":  # whose cells go through the model sequence by sequence
        groups = batches(plan.calibration.examples, max_batch_tokens=how.max_batch_tokens)
    for number, batch in enumerate(groups):
        row = work.recalled(f"gradient:{number}", partial(work.passes.predicted_row, batch))
        columns = list(batch.indices)
        if len(how.gates) > 1 and torch.tensor(row["second"]).ndim < 3:
            raise MismatchError(
                "the ledger was begun by an earlier version, which averaged over gates: choose another folder"
            )
        for target, name in ((work.intact, "ce"), (first, "first"), (second, "second")):
            target[..., columns] = torch.tensor(row[name], dtype=torch.float64)
        if work.fresh or number + 1 == len(groups):
            on_progress(number + 1, len(groups))
    if any(unit.kind == "expert" for unit in plan.units) or how.gates != (1.0,):
        for number in range(len(plan.groups)):
            work.measure_intact(number)  # which experts get tokens, and losses where gates are open
    return first, balanced(second)


def balanced(scores: Float[Tensor, "gate unit _"]) -> Float[Tensor, "unit _"]:
    """Return the mean of scores over gates, each weighed by what all its units are worth together.

    Nearly closed, a model is broken, and every unit is worth a hundred times as much as in the intact one: in a plain mean
    only that would count. Gates at which next to nothing is worth anything (`LEAST` of the largest sum) are not blown up.
    """
    totals = scores.mean(2).abs().nansum(1)
    weights = 1 / totals.clamp_min(LEAST * float(totals.max())).clamp_min(torch.finfo(totals.dtype).tiny)
    return (weights[:, None, None] * scores).sum(0) / weights.sum()


def _curvature(plan: Plan, second: Float[Tensor, "unit sequence"]) -> Float[Tensor, "unit"]:
    """Return the second-order part per token: the scale of a prediction's error."""
    return second.sum(1) / sum(example.target_tokens for example in plan.calibration.examples)


def adaptive(work: Measured, on_progress: Progress = silent) -> Effects:
    """Predict every cell as `gradient` does, then measure cells where they settle the ranking most.

    What the measured cells say of the prediction's errors is weighed in `uncertainty.posterior`. Deterministic
    for a seed; a resumed run takes the same decisions from the same values.
    """
    plan, how = work.plan, work.plan.estimator
    spent, units = plan.expansion_tokens, list(plan.units)
    budget = plan.budget_tokens
    total = round(min(budget, plan.naive_tokens))
    first, second = expanded(work, lambda done, all_: on_progress(round(spent * done / all_), total))
    tokens = torch.tensor([example.target_tokens for example in plan.calibration.examples])
    curvature = _curvature(plan, second)
    even = curvature[:, None] * tokens
    predicted = {
        "predicted_nats": even if plan.question.effect == "kl" else first + even,
        "curvature_nats": curvature,
    }
    allocation = Allocation(
        layers=torch.tensor([unit.layer for unit in plan.units]),
        lengths=torch.tensor([len(example.tokens) for example in plan.calibration.examples]),
        depth=plan.depth,
        seed=how.seed,
    )
    numbers = {batch.indices[0]: number for number, batch in enumerate(plan.groups)}
    step = max(plan.naive_tokens / DEFAULT_BUDGET / ROUNDS, 2.0 * int(allocation.lengths.sum()))
    share = step if math.isinf(budget) else (budget - spent) / ROUNDS
    for turn in itertools.count():
        effects = work.effects(spent, **predicted)
        room = min(share, budget - float(effects.description["tokens_forwarded"]))
        cells = next_cells(effects, allocation, room)
        if not cells or (how.until_certain and turn and settled(effects) >= CERTAIN):
            return effects
        by_job: dict[tuple[int, int], list[int]] = {}
        for unit, sequence in cells:
            by_job.setdefault((numbers[sequence], units[unit].layer), []).append(unit)
        for (number, layer), chosen in sorted(by_job.items()):
            work.measure_intact(number)
            work.measure(f"{turn}:{number}:{layer}", number, layer, [(units[u], 0) for u in chosen])
            work.report(on_progress, round(spent + work.tokens_forwarded), total)
    raise AssertionError


ESTIMATORS: dict[str, Callable[..., Effects]] = {
    "exact": exact,
    "gradient": gradient,
    "adaptive": adaptive,
    "relevance": gradient,
}
