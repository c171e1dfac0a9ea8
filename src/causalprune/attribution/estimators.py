"""Stage 1 of the method: how much the loss rises when a unit is removed (method §1).

Three estimators with one signature and one return type: `exact` measures every cell (unit, sequence),
`gradient` predicts all of them from a few backward passes, `adaptive` predicts all and measures some.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.attribution.measuring import Workbench
from causalprune.attribution.questions import DEFAULT_BUDGET, Estimator, Question
from causalprune.attribution.sampling import Allocation, next_cells, settled
from causalprune.core import Calibration, Decoder, Effects, Progress, Unit, silent

Job: TypeAlias = tuple[int, int]  # a batch and a layer
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
    ledger: Path | None = None,
    on_progress: Progress = silent,
) -> Effects:
    """Measure or estimate the effect of every unit on every calibration sequence.

    With `ledger`, each finished job is on disk before the next begins: a killed run goes on where it was
    and returns the same values bit for bit (same machine, same number of threads).
    """
    work = Workbench(decoder, calibration, question, estimator)
    with work.ledger(ledger):
        return ESTIMATORS[estimator.name](work, on_progress)


def exact(work: Workbench, on_progress: Progress = silent) -> Effects:
    """Measure every cell, layer by layer, from the cached input of the layer.

    Costs about half of one forward pass per unit and sequence: a masked pass skips the layers before.
    With a share of the jobs, the cells of the others stay unmeasured (NaN).
    """
    costs = exact_jobs(work)
    mine = share_of(costs, *work.estimator.share)
    total, done = sum(costs[job] for job in mine), 0.0
    for number, layer in costs:
        if layer == 0:
            work.measure_intact(number)
        if (number, layer) not in mine:
            continue
        work.measure(f"{number}:{layer}", number, layer, cells_of(work, (number, layer)))
        done += costs[number, layer]
        work.report(on_progress, round(done), round(total))
    return work.effects()


def exact_jobs(work: Workbench) -> dict[Job, float]:
    """Return the jobs of `exact`, every batch at every layer, with their cost in tokens."""
    jobs = itertools.product(range(len(work.groups)), range(work.depth))
    return {job: work.cost(*job, len(cells_of(work, job))) for job in jobs}


def cells_of(work: Workbench, job: Job) -> list[tuple[Unit, int]]:
    """Return the cells of a job: every unit of its layer, in every row of its batch."""
    number, layer = job
    rows = range(len(work.groups[number].indices))
    return [(unit, row) for unit in work.units_of(layer) for row in rows]


def share_of(costs: Mapping[Job, float], index: int, parts: int) -> Set[Job]:
    """Return the jobs of one of several parts: the longest first, each to the part with least to do."""
    loads, mine = [0.0] * parts, set()
    for job in sorted(costs, key=lambda job: -costs[job]):
        least = loads.index(min(loads))
        loads[least] += costs[job]
        if least == index - 1:
            mine.add(job)
    return mine


def gradient(work: Workbench, on_progress: Progress = silent) -> Effects:
    """Predict every cell to first order (`ce`), with the Fisher term of second order where `draws` > 0.

    Costs `1 + 2 · (1 + draws)` forward passes per sequence and gate value, a backward counted as two.
    For `kl` only the second-order term exists: a divergence has no slope at the intact model.
    """
    spent = work.expansion_tokens
    first, second = work.expanded(lambda done, all_: on_progress(round(spent * done / all_), round(spent)))
    predicted = second if work.question.effect == "kl" else first + second
    if not work.estimator.draws:
        return work.effects(spent, predicted_nats=predicted)
    return work.effects(spent, predicted_nats=predicted, curvature_nats=_curvature(work, second))


def _curvature(work: Workbench, second: Float[Tensor, "unit sequence"]) -> Float[Tensor, "unit"]:
    """Return the second-order part per token: the scale of a prediction's error."""
    return second.sum(1) / sum(example.target_tokens for example in work.calibration.examples)


def adaptive(work: Workbench, on_progress: Progress = silent) -> Effects:
    """Predict every cell as `gradient` does, then measure cells where they settle the ranking most.

    What the measured cells say of the prediction's errors is weighed in `uncertainty.posterior`. Deterministic
    for a seed; a resumed run takes the same decisions from the same values.
    """
    how = work.estimator
    spent, units = work.expansion_tokens, list(work.units)
    limit = math.inf if how.until_certain else work.naive_tokens / DEFAULT_BUDGET
    budget = limit if how.budget is None else work.naive_tokens / how.budget
    total = round(min(budget, work.naive_tokens))
    first, second = work.expanded(lambda done, all_: on_progress(round(spent * done / all_), total))
    tokens = torch.tensor([example.target_tokens for example in work.calibration.examples])
    curvature = _curvature(work, second)
    even = curvature[:, None] * tokens
    predicted = {
        "predicted_nats": even if work.question.effect == "kl" else first + even,
        "curvature_nats": curvature,
    }
    plan = Allocation(
        layers=torch.tensor([unit.layer for unit in work.units]),
        lengths=torch.tensor([len(example.tokens) for example in work.calibration.examples]),
        depth=work.depth,
        seed=how.seed,
    )
    numbers = {batch.indices[0]: number for number, batch in enumerate(work.groups)}
    step = max(work.naive_tokens / DEFAULT_BUDGET / ROUNDS, 2.0 * int(plan.lengths.sum()))
    share = step if math.isinf(budget) else (budget - spent) / ROUNDS
    for turn in itertools.count():
        effects = work.effects(spent, **predicted)
        room = min(share, budget - float(effects.description["tokens_forwarded"]))
        cells = next_cells(effects, plan, room)
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


ESTIMATORS: dict[str, Callable[..., Effects]] = {"exact": exact, "gradient": gradient, "adaptive": adaptive}
