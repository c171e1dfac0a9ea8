"""How certain effects are: intervals on every unit, signs, agreement between halves and draws.

Everything is computed from per-sequence values; nothing here runs a model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its parts are imported at their first use: half a second and 30 MB
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causalprune.core import Effects

CONFIDENCE = 0.95
SPLITS = 50
TOP_SHARE = 0.2
"""The share of units that the method calls critical: fewer than a fifth of the heads score high (method §4)."""

PRIOR = 4.0
"""Degrees of freedom of the law for the variance of cells, beside those of a unit's own cells."""
FLOOR, TAU, LEAST_TAU = 0.3, 0.5, 0.2
"""Smallest curvature by the median; the relative error of predictions assumed at first, and the least believed."""
CELL = 1.5
"""Standard deviation of one cell by curvature, assumed until three units have two cells each."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Effect per unit in nats per target token with its 95 % interval; NaN where nothing was measured.

    The interval is about other problems drawn like those of the calibration set, and about the cells that
    were not measured: without any, about the error that predictions had where they were checked. Predictions
    without a second-order part have no such error to go by; their interval is about the problems alone.
    """

    value: Float[Tensor, "unit"]
    low: Float[Tensor, "unit"]
    high: Float[Tensor, "unit"]

    def certain_sign(self) -> Bool[Tensor, "unit"]:
        """Tell whether the interval excludes zero."""
        return (self.low > 0) | (self.high < 0)


def estimate(effects: Effects) -> Estimate:
    """Return effects with intervals.

    All cells measured: the paired mean over sequences. None: the prediction. Some: the prediction, corrected
    by its mean error on the measured cells of the unit, as far as these say more than the errors of all
    units do (`posterior`).
    """
    tokens, n = effects.tokens.double(), len(effects.tokens)
    if effects.predicted_nats is None:
        value, variance = _mean_and_variance(effects.change_nats(), tokens)
        return _with_interval(effects, value, variance)
    value, variance = _mean_and_variance(effects.predicted_nats, tokens)
    if effects.curvature_nats is None:
        return _with_interval(effects, value, variance)
    known = posterior(effects)
    left = known.cell_variance / n  # errors differ between sequences too, which the prediction does not show
    return _with_interval(effects, value + known.correction, variance + left + known.variance)


@dataclass(frozen=True, eq=False)
class Posterior:
    """What measured cells say of the error of a prediction, in nats per token and unit.

    `correction` is the mean error on the calibration set, with its `variance`; `cell_variance` that of one
    cell about its unit's mean, `scale` the standard deviation of errors between units of the same kind.
    """

    correction: Float[Tensor, "unit"]
    variance: Float[Tensor, "unit"]
    cell_variance: Float[Tensor, "unit"]
    scale: Float[Tensor, "unit"]

    def variance_at(self, cells: Float[Tensor, "n"], n: int, unit: int) -> Float[Tensor, "n"]:
        """Return the variance of a unit's correction if it had these numbers of its `n` cells measured."""
        sampling = self.cell_variance[unit] * (1 / cells - 1 / n).clamp_min(0)
        between = self.scale[unit].square()
        return between * sampling / (between + sampling).clamp_min(1e-300)


def posterior(effects: Effects) -> Posterior:
    """Return what measured cells say of the prediction's errors, each kind of units for itself."""
    fields = ("correction", "variance", "cell_variance", "scale")
    whole = {name: torch.full((len(effects.units),), math.nan, dtype=torch.float64) for name in fields}
    for kind in dict.fromkeys(unit.kind for unit in effects.units):
        own = _posterior(effects.of(kind))
        at = torch.tensor([unit.kind == kind for unit in effects.units])
        for name in fields:
            whole[name][at] = getattr(own, name)
    return Posterior(**whole)


def _posterior(effects: Effects) -> Posterior:
    """Weigh the errors measured on each unit's cells against those of all units (empirical Bayes).

    Between units the error of a prediction grows with its second-order part (`curvature_nats`): it has the
    mean `shift · curvature` and the standard deviation `τ · curvature`, both estimated by moments and held
    near what was seen before (0 and `TAU`) while few units speak; as is a law for the variance of cells,
    `∝ curvature^power`, which a unit's own cells then outweigh.
    """
    assert effects.predicted_nats is not None
    assert effects.curvature_nats is not None
    n, per_token = len(effects.tokens), len(effects.tokens) / float(effects.tokens.sum())
    error = (effects.change_nats() - effects.predicted_nats) * per_token
    count = (~error.isnan()).sum(1).double()
    mean = error.nansum(1) / count.clamp_min(1)
    curvature = effects.curvature_nats.clamp_min(FLOOR * float(effects.curvature_nats.median()) + 1e-12)
    squares = (error - mean[:, None]).square().nansum(1)
    cell = (squares + PRIOR * _variance_law(squares, count, curvature)) / (PRIOR + (count - 1).clamp_min(0))
    sampling = cell * (1 / count.clamp_min(1) - 1 / n).clamp_min(0)
    there = count > 0
    weight = torch.where(there, 1 / (sampling + (curvature * TAU).square()), 0.0)
    shift = float((weight * mean * curvature).sum() / ((weight * curvature.square()).sum() + TAU**-2))
    excess = ((mean - shift * curvature).square() - sampling) / curvature.square()
    trust = torch.where(there, 1 / (sampling / curvature.square() + TAU**2).square(), 0.0)
    least = torch.finfo(trust.dtype).tiny
    voices = float(
        trust.sum().square() / trust.square().sum().clamp_min(least)
    )  # units that speak, by their weights
    moment = float((trust * excess).sum() / trust.sum().clamp_min(least))
    tau = math.sqrt(max((voices * moment + PRIOR * TAU**2) / (voices + PRIOR), LEAST_TAU**2))
    scale = tau * curvature
    share = torch.where(there, scale.square() / (scale.square() + sampling), 0.0)
    variance = torch.where(there, share * sampling, scale.square())
    return Posterior(share * mean + (1 - share) * shift * curvature, variance, cell, scale)


def _variance_law(squares: Tensor, count: Tensor, curvature: Tensor) -> Tensor:
    """Return the variance of a cell that all units together suggest, from those with two cells or more."""
    enough = (count >= 2) & (squares > 0)
    if int(enough.sum()) < 3:
        return (CELL * curvature).square()
    x, y = curvature[enough].log(), (squares / (count - 1))[enough].log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum().clamp_min(1e-12))
    law = (slope * (curvature.log() - x.mean())).exp()
    return law * float((squares[enough] / law[enough]).sum() / (count[enough] - 1).sum())


def scores(effects: Effects) -> Float[Tensor, "unit"]:
    """Return the method's Δ where every cell was measured, else the estimate."""
    return effects.delta_nats() if effects.predicted_nats is None else estimate(effects).value


def reliability(effects: Effects, seed: int = 0) -> dict[str, float]:
    """Return how well effects repeat themselves: the certainty that every table of them should carry.

    | key | meaning |
    |---|---|
    | `certain_signs` | share of units whose 95 % interval excludes zero (not for `kl`: divergences have no sign) |
    | `split_half` | Spearman correlation of the effects on two random halves of the sequences, mean of 50 splits |
    | `split_half_top_fifth` | share of the top fifth of units that two halves have in common |
    | `between_subsets` | mean Spearman correlation between the K subsets |

    Only the first of `adaptive`, whose predictions share the size of their error among all sequences: halves would agree by that.
    """
    bounds = estimate(effects)
    found: dict[str, float] = {}
    if effects.effect == "ce":
        found["certain_signs"] = float(bounds.certain_sign()[~bounds.value.isnan()].double().mean())
    if effects.predicted_nats is not None and effects.estimator == "adaptive":
        return found
    change = effects.change_nats() if effects.predicted_nats is None else effects.predicted_nats
    known = ~change.isnan().any(1)
    change, tokens = change[known], effects.tokens.double()
    n, random = change.shape[1], np.random.default_rng(seed)
    if n >= 2 and len(change) >= 2:
        halves = [random.permutation(n) for _ in range(SPLITS)]
        pairs = [[_mean(change, tokens, half) for half in (p[: n // 2], p[n // 2 :])] for p in halves]
        found["split_half"] = float(np.mean([spearman(a, b) for a, b in pairs]))
        found["split_half_top_fifth"] = float(np.mean([top_overlap(a, b) for a, b in pairs]))
    subsets = [np.flatnonzero(effects.subset.numpy() == k) for k in range(int(effects.subset.max()) + 1)]
    if len(subsets) > 1 and len(change) >= 2:
        means = [_mean(change, tokens, subset) for subset in subsets]
        found["between_subsets"] = agreement(means, spearman)
    return found


def agreement(draws: list[Tensor], measure: Callable[[Tensor, Tensor], float]) -> float:
    """Return the mean of a measure over all pairs of draws."""
    pairs = [(a, b) for i, a in enumerate(draws) for b in draws[i + 1 :]]
    return float(np.mean([measure(a, b) for a, b in pairs]))


def spearman(a: Float[Tensor, "unit"], b: Float[Tensor, "unit"]) -> float:
    """Return the rank correlation of two lists of scores; NaN if one of them is constant."""
    ranks = [scipy.stats.rankdata(x.numpy()) for x in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def top_overlap(a: Float[Tensor, "unit"], b: Float[Tensor, "unit"]) -> float:
    """Return the share of the top fifth of units that two lists of scores have in common."""
    k = max(1, round(TOP_SHARE * len(a)))
    return len(set(a.topk(k).indices.tolist()) & set(b.topk(k).indices.tolist())) / k


def described(effects: Effects) -> dict[str, Any]:
    """Return `reliability` and the cost of effects, for results and reports."""
    known = {key: effects.description.get(key) for key in ("estimator", "tokens_forwarded", "naive_tokens")}
    return {**reliability(effects), **known, "units": len(effects.units), "sequences": len(effects.tokens)}


def _mean(change: Tensor, tokens: Tensor, chosen: Any) -> Tensor:
    return change[:, chosen].sum(1) / tokens[chosen].sum()


def _mean_and_variance(change: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ratio of sums and its variance over sequences, by linearisation (Särndal §5.6)."""
    n = len(tokens)
    mean = change.sum(1) / tokens.sum()
    rest = change - mean[:, None] * tokens
    variance = rest.square().sum(1) / (n * max(n - 1, 1) * tokens.mean() ** 2)
    return mean, variance if n > 1 else torch.full_like(mean, math.inf)


def _with_interval(effects: Effects, value: Tensor, variance: Tensor) -> Estimate:
    """Return the interval by Student's t: of the logarithm for divergences, which are positive and skewed."""
    freedom = max(len(effects.tokens) - 1, 1)
    reach = variance.sqrt() * float(scipy.special.stdtrit(freedom, (1 + CONFIDENCE) / 2))
    low, high = value - reach, value + reach
    if effects.effect == "kl":
        factor = (reach / value).exp()
        low = torch.where(value > 0, value / factor, low)
        high = torch.where(value > 0, value * factor, high)
    return Estimate(value, low, high)
