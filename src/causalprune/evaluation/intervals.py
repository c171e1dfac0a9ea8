"""Intervals over examples: resampled together, widened where examples are few, opened where nothing changed."""

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import scipy  # its parts are imported at their first use: half a second and 30 MB
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
FLIPS = 6
"""Changes to one side from which there is evidence of it: half to the sixth is 0.016, twice that below 0.05."""
FEW = 8
"""Examples below which quantiles of resamples are too narrow: two of them would exclude 0 in half of all cases."""
CONFIDENCE = 0.95
CHUNK = 4_000_000
"""Resampled examples held in memory at a time."""


def bootstrap(columns: Floats, resamples: int, seed: int) -> Floats:
    """Return the sums `[column resample]` of examples drawn with replacement, the same for all columns."""
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [
            columns @ counts.T.astype(np.float64) for counts in _draws(columns.shape[1], resamples, seed)
        ]
    return np.concatenate(parts, axis=1)


@functools.lru_cache(maxsize=4)
def _draws(n: int, resamples: int, seed: int) -> tuple[NDArray[np.uint8], ...]:
    """Return how often each of `n` examples is drawn, `[resample example]` in parts: kept for the next result."""
    random = np.random.default_rng(seed)
    size = max(CHUNK // n, 1)
    parts = []
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        places = random.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        counts = np.bincount(places.ravel(), minlength=rows * n)
        parts.append(counts.astype(np.uint8).reshape(rows, n))
    return tuple(parts)


def bracketed(low: float, high: float, n: int | None = None, form: str = "+.3g") -> str:
    """Return an interval as it is printed, or that there is none: of one example, or where something is not finite."""
    if math.isnan(low + high):
        return "(one example: no interval)" if n == 1 else "(no interval)"
    return f"[{low:{form}}, {high:{form}}]"


def bounds(draws: Floats, n: int) -> tuple[float, float]:
    """Return the 95 % percentile bounds, widened for small n.

    The bootstrap variance is `(n − 1) / n` of the unbiased one and its quantiles are normal, not t;
    Hesterberg's expanded percentile interval (The American Statistician 69, 2015, §4.3) mends both.
    """
    if n < 2 or not np.isfinite(draws).all():
        return math.nan, math.nan
    if n < FEW:  # resamples of a few cannot leave their range: Student's t from how far they scatter
        quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
        reach = math.sqrt(n / (n - 1)) * float(draws.std()) * quantile
        return float(draws.mean()) - reach, float(draws.mean()) + reach
    tail = scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def opened(change: Sequence[float], difference: float, low: float, high: float) -> tuple[float, float]:
    """Return the interval of a difference of shares, opened where all that changed did so to one side.

    Resamples know nothing of a change that was not seen: its share may be as large as `room`. And fewer than `FLIPS` changes
    are no evidence of a side (sign test).
    """
    changed, room_ = sum(map(bool, change)), room(len(change)) * (max(map(abs, change)) or 1.0)
    if min(change) >= 0:
        low = min(low, difference - room_, 0.0 if changed < FLIPS else low)
    if max(change) <= 0:
        high = max(high, difference + room_, 0.0 if changed < FLIPS else high)
    return max(low, -1.0), min(high, 1.0)


def room(n: int) -> float:
    """Return the largest share of which so many examples may show nothing, at 95 % (to two sides; Clopper and Pearson 1934)."""
    return float(1 - ((1 - CONFIDENCE) / 2) ** (1 / n))
