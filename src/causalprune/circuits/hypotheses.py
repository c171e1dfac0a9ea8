"""Tests of what a circuit should be (Shi et al. 2024, arXiv 2410.13032): pure functions of losses."""

from typing import Any

import numpy as np
import scipy  # its parts are imported at their first use: half a second and 30 MB
from jaxtyping import Float
from torch import Tensor

Q, EPSILON, LEVEL = 0.9, 0.1, 0.05
"""Share of random circuits that a circuit has to beat, distance from a fair coin that is none, and level of all tests."""
PERMUTATIONS = 1000


def better_than(own: Float[Tensor, ""], others: Float[Tensor, "other"]) -> dict[str, Any]:
    """Test whether a value is above more than the share `Q` of a population, from a sample of it.

    The hypothesis is that it is not; a small p rejects it.
    """
    beaten = int((own > others).sum())
    p = float(scipy.stats.binom.sf(beaten - 1, len(others), Q))
    return {"beaten": beaten, "of": len(others), "p": p, "holds": p < LEVEL}


def equivalence(model: Float[Tensor, "problem"], circuit: Float[Tensor, "problem"]) -> dict[str, Any]:
    """Test whether circuit and model are ahead of each other equally often, to within `EPSILON`.

    The hypothesis is that they are; a small p rejects it. Problems on which they are level say nothing.
    """
    n, ahead = int((circuit != model).sum()), int((circuit < model).sum())
    distance = abs(ahead / n - 0.5) if n else 0.0
    counts = np.arange(n + 1)
    far = np.abs(counts / max(n, 1) - 0.5) >= distance - 1e-12
    p = float(scipy.stats.binom.pmf(counts[far], n, 0.5 + EPSILON).sum())
    return {"ahead": ahead, "of": n, "p": min(p, 1.0), "holds": p >= LEVEL}


def independence(
    model: Float[Tensor, "problem"], rest: Float[Tensor, "problem"], seed: int = 0
) -> dict[str, Any]:
    """Test whether what the rest of the model makes of problems says nothing of what the whole makes of them (HSIC, permuted).

    The hypothesis is that it says nothing; a small p rejects it.
    """
    first, second = _kernel(model), _kernel(rest)
    random, n = np.random.default_rng(seed), len(model)
    centred = first - first.mean(0) - first.mean(1, keepdims=True) + first.mean()
    own = float((centred * second).mean())
    drawn = [
        float((centred * second[np.ix_(order, order)]).mean())
        for order in (random.permutation(n) for _ in range(PERMUTATIONS))
    ]
    p = (1 + sum(value >= own for value in drawn)) / (1 + PERMUTATIONS)
    return {"hsic": own, "p": p, "holds": p >= LEVEL}


def _kernel(values: Float[Tensor, "problem"]) -> Any:
    """Return a Gaussian kernel, as wide as the median distance."""
    x = values.double().numpy()
    distance = np.abs(x[:, None] - x[None])
    positive = distance[distance > 0]
    return np.exp(-np.square(distance / (np.median(positive) if len(positive) else 1.0)) / 2)


def minimality(members: Float[Tensor, "member"], added: Float[Tensor, "other"]) -> dict[str, Any]:
    """Test of each member whether it moves the loss more than the share `Q` of units that are added; at `LEVEL` for all of them.

    `spare` are those, by number, of which that is not shown. Where so few units are outside of the circuit that it could be shown
    of none, nothing can be said.
    """
    if Q ** len(added) >= LEVEL / len(members):
        return {"tested": len(members), "spare": [], "p": 1.0, "holds": False, "outside": len(added)}
    p = [float(scipy.stats.binom.sf(int((own > added).sum()) - 1, len(added), Q)) for own in members]
    spare = [at for at, value in enumerate(p) if value >= LEVEL / len(p)]
    worst = min(1.0, max(p) * len(p))  # for all of them (Bonferroni)
    return {"tested": len(p), "spare": spare, "p": worst, "holds": not spare}
