"""What a circuit is worth by its size: pure functions of losses per problem, with paired intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.evaluation import Floats, bounds

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes at which circuits are measured (MIB, arXiv 2504.13151)."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval over problems."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A circuit of one size: `share` of the units (of the weights where kinds are mixed), and what is left of the behaviour.

    `nats` is the loss per target token above the intact model's, `kl` the divergence from it, `faithfulness` MIB's f: 1 for
    the intact model, 0 for the one without any of the units.
    """

    share: float
    units: int
    weights: int
    nats: Value
    kl: Value
    faithfulness: Value


@dataclass(frozen=True)
class Curve:
    """Circuits of all sizes; `cpr` is the area under f, `cmd` that under |1 − f|, over the share.

    `empty` is the loss above the intact model's with no unit left, `intact` the intact model's own, both in nats per target
    token, `guessing` what a guess among all tokens costs (nothing where right and wrong answers are compared). Where the empty model is above guessing, f flatters.
    """

    points: tuple[Point, ...]
    cpr: Value
    cmd: Value
    intact: Value
    empty: Value
    guessing: float


def resampled(values: Float[Tensor, "*any problem"], seed: int = 0) -> Floats:
    """Return means over resamples of the problems, the same ones for all rows: `[… resample]`."""
    n = values.shape[-1]
    counts = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=RESAMPLES)
    return np.asarray(values.double().numpy() @ counts.T / n)


def summed_up(values: Float[Tensor, "problem"]) -> Value:
    """Return the mean over problems with its interval."""
    return Value(float(values.mean()), *bounds(resampled(values), len(values)))


def faithfulness(values: Floats, intact: Floats, empty: Floats) -> Floats:
    """Return f = (m(C) − m(∅)) / (m(N) − m(∅)) from mean losses, which are −m."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((empty - values) / (empty - intact))


def areas(shares: Sequence[float], f: Floats) -> tuple[Floats, Floats]:
    """Return CPR and CMD of curves `[size …]` by trapezoids over the linear share."""
    at = np.asarray(shares)
    with np.errstate(invalid="ignore"):  # where closing everything changes nothing there is no f
        found = (np.trapezoid(own, at, axis=0) for own in (f, np.abs(1 - f)))
        cpr, cmd = map(np.asarray, found)
    return cpr, cmd


def curve(
    sizes: Sequence[tuple[float, int, int]],
    nats: Float[Tensor, "size problem"],
    kl: Float[Tensor, "size problem"],
    ends: Mapping[str, Float[Tensor, "problem"]],
    vocabulary: int,
) -> Curve:
    """Return the curve of circuits of these sizes (share, units, weights); `ends` are the losses of `intact` and `empty`."""
    n, intact, empty = nats.shape[1], ends["intact"], ends["empty"]
    draws = resampled(torch.cat([nats, intact[None], empty[None]]))
    whole = torch.cat([nats, intact[None], empty[None]]).mean(1).numpy()
    f, f_draws = (faithfulness(own[:-2], own[-2:-1], own[-1:]) for own in (whole, draws))
    shares = [share for share, *_ in sizes]
    both = zip(areas(shares, f), areas(shares, f_draws), strict=True)
    cpr, cmd = (Value(float(own), *bounds(of, n)) for own, of in both)
    points = tuple(
        Point(
            *size, summed_up(nats[i] - intact), summed_up(kl[i]), Value(float(f[i]), *bounds(f_draws[i], n))
        )
        for i, size in enumerate(sizes)
    )
    return Curve(points, cpr, cmd, summed_up(intact), summed_up(empty - intact), math.log(vocabulary))
