"""What the weights of a projection are worth: from what walks have gathered to the method's criterion."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalprune.core import ModelError, Projection, bands
from causalprune.pruning.criteria import CRITERIA, Evidence
from causalprune.pruning.obs import inverse_factor
from causalprune.pruning.walks import Gathered, Plan


def score(plan: Plan, gathered: Gathered, p: Projection) -> Float[Tensor, "out in"]:
    """Return what the weights of a projection are worth, by the method's criterion."""
    method, weight, norm, diagonal = plan.method, p.read(), None, None
    if "inputs" in method.needs:
        norm = _known(plan, p, gathered.norms.root_mean_square).expand(weight.shape[1])
    if "moments" in method.needs:
        diagonal = inverse(plan, gathered, p).square().sum(0)
    evidence = Evidence(
        input_norm=norm,
        output_slope=slope(plan, gathered, p),
        inverse=diagonal,
        factor=plan.factors.get(p.name),
        gradient=_gradient(plan, gathered, p),
        seed=zlib.crc32(f"{method.seed}:{p.name}".encode()),
    )
    return finite(p, CRITERIA[method.criterion].score(weight, evidence))


def score_blocks(plan: Plan, gathered: Gathered, p: Projection) -> Iterator[Float[Tensor, "rows in"]]:
    """Yield what the weights of a projection are worth: some rows at a time where they can be scored by value."""
    criterion = CRITERIA[plan.method.criterion]
    if not criterion.by_value:
        yield score(plan, gathered, p)
        return
    weight, factor = p.read(), plan.factors.get(p.name)
    for band in bands(weight):
        own = factor if factor is None or len(factor) == 1 else factor[band]
        yield finite(p, criterion.score(weight[band], Evidence(factor=own)))


def slope(plan: Plan, gathered: Gathered, p: Projection) -> Float[Tensor, "out"] | None:
    """Return the root mean square of the gradient at the outputs, None where rows are not compared by it."""
    if not gathered.slopes:
        return None
    known = _known(plan, p, lambda q: gathered.slopes.get(q.name), _unmoved(plan))
    return known.float().expand(p.shape[0])


def _gradient(plan: Plan, gathered: Gathered, p: Projection) -> Float[Tensor, "#out #in"] | None:
    """Return the gradient at the weights, the mean of its siblings for an expert without tokens; None where none were taken."""
    if not gathered.gradients:
        return None

    def of(q: Projection) -> Tensor | None:
        if (own := gathered.gradients.get(q.parameter)) is None:
            return None
        slopes = replace(q, parameter=nn.Parameter(own, requires_grad=False)).read()
        return None if q.expert is not None and not bool(slopes.any()) else slopes.flatten()

    known = _known(plan, p, of, _unmoved(plan))
    return known.view(1, 1) if known.numel() == 1 else known.view(p.shape)


def inverse(plan: Plan, gathered: Gathered, p: Projection) -> Float[Tensor, "in in"]:
    """Return the factor of the inverse second moments, made once for projections that share inputs."""
    seen, tokens = gathered.moments.hessians, gathered.moments.tokens
    hessian = seen.get(p.name)
    if hessian is None or not tokens.get(p.name):  # an expert that no token reached
        known = _known(plan, p, lambda q: seen[q.name].diagonal() if tokens.get(q.name) else None)
        hessian = known.float().expand(p.shape[1]).diag()
    if gathered.inverse is None or gathered.inverse[0] is not hessian:
        gathered.inverse = hessian, inverse_factor(hessian, plan.method.damping, p.parameter_name)
    return gathered.inverse[1]


def finite(p: Projection, values: Tensor) -> Tensor:
    """Return what was made of a projection's inputs or factors, or raise `ModelError` where it is not finite."""
    if not bool(torch.isfinite(values.amax())):  # which is NaN if any is
        raise ModelError(f"{p.parameter_name} ({p.name}) has inputs or factors that are not finite")
    return values


def _unmoved(plan: Plan) -> float:
    """Return the gradient where the loss does not depend on a matrix: none beside others, else alike for its weights."""
    return 0.0 if plan.method.resolved_scope == "global" else 1.0


def _known(
    plan: Plan, p: Projection, of: Callable[[Projection], Tensor | None], without: float = 1.0
) -> Float[Tensor, "#features"]:
    """Return what is known of a projection's inputs or outputs.

    For an expert that no token reached that is one number, the root mean square over its siblings: it is neither
    free nor worth more than they are. `without` where nothing is known of them either.
    """
    if (own := of(p)) is not None:
        return own
    siblings = plan.decoder.layers[p.layer].projections
    found = [vector for q in siblings if q.role == p.role and (vector := of(q)) is not None]
    known = torch.cat(found).square().mean().sqrt() if found else torch.tensor(without)
    return known.to(p.device).view(1)
