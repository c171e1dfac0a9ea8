"""How much every matrix loses, where graded interventions show what the task can spare."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.core import Projection
from causalprune.pruning.allocation import dense_shares, graded_shares, keep_columns
from causalprune.pruning.grading import DoseResponse, Experiment, dose_response, untried
from causalprune.pruning.methods import pattern_sparsity
from causalprune.pruning.obs import sparsegpt
from causalprune.pruning.parts import Steps
from causalprune.pruning.scores import inverse, score, slope
from causalprune.pruning.walks import Gathered, Plan, walk


def measured_response(plan: Plan, gathered: Gathered, steps: Steps) -> DoseResponse | None:
    """Return what the task loses by graded interventions, None where all matrices lose the same share."""
    method = plan.method
    if method.resolved_budgets == "uniform":
        return None
    fused = pattern_sparsity(method.resolved_scope) is not None
    experiment, tried = Experiment(plan.few, method.doses, fused), partial(trial, plan, gathered)
    first, moments = untried(plan.decoder, experiment, plan.state), "moments" in method.needs
    layers = walk(plan, gathered, steps, advance_pruned=False, moments=moments, first=first)
    steps.begin("trials", "layers")
    return dose_response(plan.decoder, layers, experiment, tried, plan.state)


def shares_of(plan: Plan, found: DoseResponse) -> list[float]:
    """Return the sparsity of every matrix by what the task was measured to lose."""
    wanted, pattern = plan.method.sparsity, pattern_sparsity(plan.method.resolved_scope)
    if pattern is not None:
        chosen = dense_shares(found.nats[:, 0], found.sizes, pattern, wanted)
    else:
        chosen = graded_shares(found.nats, found.sparsities, found.sizes, wanted).tolist()
    by_name = {name: share for group, share in zip(found.members, chosen, strict=True) for name in group}
    return [by_name[p.name] for p in plan.decoder.projections]


def trial(
    plan: Plan, gathered: Gathered, p: Projection, sparsities: Sequence[float]
) -> Sequence[Float[Tensor, "out in"]]:
    """Return a matrix of the intact model pruned alone to each sparsity, with no update but the criterion's own.

    SparseGPT goes through the columns once, for all sparsities side by side.
    """
    scope, times = plan.method.resolved_scope, len(sparsities)
    counts = [round(sparsity * p.size) for sparsity in sparsities]
    choices = [partial(keep_columns, scope, count, p.shape) for count in counts]
    if "moments" not in plan.method.needs:
        worth = score(plan, gathered, p)
        return [torch.where(choose(worth, 0), p.read(), 0.0) for choose in choices]

    def choose_all(worth: Tensor, start: int) -> Tensor:
        parts = zip(choices, worth.chunk(times), strict=True)
        return torch.cat([choose(part, start) for choose, part in parts])

    many, own = p.read().repeat(times, 1), slope(plan, gathered, p)
    rows = None if own is None else own.repeat(times)
    upper = inverse(plan, gathered, p)
    found, _ = sparsegpt(many, upper, choose_all, group=plan.method.group, rows=rows)
    return found.to(p.parameter.dtype).chunk(times)
