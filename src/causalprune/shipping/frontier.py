"""Files that a model can become, by what they take and what they cost: predicted, measured, and chosen within a limit."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from causalprune.core import EvalResult, OptionError
from causalprune.evaluation import headline, higher_is_better

NEAR = 0.02
"""How far from the predicted frontier a point is measured, in nats (or shares of problems)."""
Kind: TypeAlias = Literal["size", "speed", "keep"]
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}


@dataclass(frozen=True)
class Limit:
    """What the file has to meet: its bytes at most, its speed over dense at Q8_0 at least, or the share of the task that it keeps."""

    kind: Kind
    value: float

    def __str__(self) -> str:
        if self.kind == "size":
            return f"at most {self.value / 1e6:g} MB"
        return (
            f"at least {self.value:g} × the speed"
            if self.kind == "speed"
            else f"at least {self.value:g} of the task kept"
        )


def limit_of(size: str | None, speed: str | None, keep: float | None) -> Limit:
    """Return the limit that is asked for: one of `400MB`, `1.5x`, or a share.

    Raises:
        OptionError: there is none, more than one, or one that cannot be.
    """
    if sum(own is not None for own in (size, speed, keep)) != 1:
        raise OptionError("name one limit: --size 400MB, --speed 1.5x or --keep 0.95")
    if size is not None:
        return Limit("size", bytes_of(size))
    if speed is not None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)x?", speed.strip().lower())
        if not found or not float(found[1]):
            raise OptionError(f"a speed is how many times dense's at Q8_0, as 1.5x, not {speed!r}")
        return Limit("speed", float(found[1]))
    if keep is None or not 0 < keep <= 1:
        raise OptionError(f"a share to keep is above 0 and at most 1, as 0.95, not {keep}")
    return Limit("keep", keep)


def bytes_of(size: str) -> float:
    """Return the bytes that `400MB` (10⁶ bytes) or `1.5GB` names; raises `OptionError` for what names none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kb|mb|gb)", size.strip().lower())
    if not found or not float(found[1]):
        raise OptionError(f"a size is a number and its unit, as 400MB (10⁶ bytes) or 1.5GB, not {size!r}")
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True)
class Point:
    """A file: the share of parameters that is gone, its types, its bytes, and how much worse it is than dense.

    `predicted` is the rise on the deciding half before it was measured, None where nothing predicts it; `result` what was measured.
    """

    share: float
    mix: str
    bytes: int
    predicted: float | None = None
    result: EvalResult | None = None

    @property
    def name(self) -> str:
        """What it is called: `q4_k_m` or `0.1-q4_k_m`."""
        return f"{self.share:g}-{self.mix}" if self.share else self.mix


def half(result: EvalResult, which: Literal[0, 1]) -> EvalResult:
    """Return every other problem of a result: the first, third, … decide, the others are what is reported.

    Problems of one prompt are in one half.
    """
    number = {content: i for i, content in enumerate(dict.fromkeys(result.examples))}
    mine = [i for i, content in enumerate(result.examples) if number[content] % 2 == which]
    own: dict[str, Any] = {
        key: tuple(getattr(result, key)[i] for i in mine) for key in ("values", "weights", "examples")
    }
    return replace(result, **own, texts=(), prompts=(), golds=())


def worse(result: EvalResult, dense: EvalResult) -> float:
    """Return by how much a result is worse: nats per token, the logarithm of a perplexity, or a share of problems."""
    own, whole = headline(result), headline(dense)
    if result.metric == "perplexity":
        own, whole = math.log(own), math.log(whole)
    return whole - own if higher_is_better(result) else own - whole


def can_keep(dense: EvalResult) -> bool:
    """Tell whether a share of a result can be kept: of a likelihood, or of a score above zero that never is below."""
    if dense.metric in ("nats_per_token", "perplexity"):
        return True
    return bool(higher_is_better(dense)) and min(dense.values) >= 0 and headline(dense) > 0


def kept(result: EvalResult, dense: EvalResult) -> float:
    """Return the share that is kept: of the likelihood per token, or of what dense scores; 0 where it `can_keep` none."""
    if not can_keep(dense):
        return 0.0
    if higher_is_better(result):
        return headline(result) / headline(dense)  # exactly what a limit may ask for
    return kept_after(worse(result, dense), dense)


def kept_after(rise: float, dense: EvalResult) -> float:
    """Return the share that is kept by what is expected to be so much worse than dense, which `can_keep` some."""
    return 1 - rise / headline(dense) if higher_is_better(dense) else math.exp(-rise)


def worth_measuring(points: Sequence[Point], rises: Mapping[str, float]) -> list[Point]:
    """Return the points that are not measured and near the frontier, by their prediction, of all that is measured or predicted."""
    values = {p.name: rises.get(p.name, p.predicted) for p in points}
    return [
        p
        for p in points
        if p.name not in rises
        and (own := p.predicted) is not None
        and not any(
            other.bytes <= p.bytes and (value := values[other.name]) is not None and value < own - NEAR
            for other in points
        )
    ]


def best(
    points: Iterable[Point], rises: Mapping[str, float], limit: Limit, keeps: Mapping[str, float]
) -> list[Point]:
    """Return the measured points that meet a limit, the best first: of the smallest rise, or the smallest file that keeps the share.

    A limit on speed is met by whatever is timed to meet it, the caller's part.
    """
    known = [p for p in points if p.name in rises]
    if limit.kind == "keep":
        return sorted((p for p in known if keeps[p.name] >= limit.value), key=lambda p: p.bytes)
    within = [p for p in known if limit.kind == "speed" or p.bytes <= limit.value]
    return sorted(within, key=lambda p: (rises[p.name], p.bytes))


def front(points: Iterable[Point], rises: Mapping[str, float]) -> list[Point]:
    """Return the measured points than which no other is both as small and as good, the largest first."""
    found: list[Point] = []
    for point in sorted((p for p in points if p.name in rises), key=lambda p: (p.bytes, rises[p.name])):
        if not found or rises[point.name] < rises[found[-1].name]:
            found.append(point)
    return found[::-1]


def pays_below(points: Sequence[Point], rises: Mapping[str, float]) -> int | None:
    """Return the largest file without a share of its parameters that is better than all whole ones of its size, of which there is one.

    None if there is none: where no whole file is so small, nothing was compared.
    """
    known = [p for p in points if p.name in rises]
    whole = [p for p in known if not p.share]
    found = [
        p.bytes
        for p in known
        if p.share
        and (rivals := [w for w in whole if w.bytes <= p.bytes])
        and all(rises[p.name] < rises[w.name] for w in rivals)
    ]
    return max(found, default=None)
