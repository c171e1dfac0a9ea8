"""How a model is to be corrected, and what came of it: records that say all of it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from causalprune.attribution import Estimator
from causalprune.circuits import Value
from causalprune.core import METHOD_VERSION, EvalResult, Masks, OptionError, Shown, Unit, unknown
from causalprune.correction.scores import ACTIVE, SCORES
from causalprune.pruning import Update

CORRECTION = "correction.json"
UPDATES: tuple[Update, ...] = ("none", "refit", "distill")
ESTIMATORS = ("gradient", "integrated", "relevance")
UNITS = ("neurons:1",)


@dataclass(frozen=True)
class Contrast:
    """How parts are chosen that carry what is undesired and little else.

    `units` are as everywhere, or with `weights` single weights are taken instead. `budget` is how many go at most: a share
    below 1, a number from 1 on. `harm` is how much the perplexity of each source that is to be preserved may rise on the
    deciding half, as a share (0.01 is 1 %), or of clean texts the divergence (`Point`); with `certain` by the upper end of its interval. `score` ranks them (`scores.SCORES`),
    by slopes of an `estimator`, anew in each of the `rounds` with those closed that are chosen by then, which stay chosen but for
    units by `contrast`. `damp` is what is left of what they send, 0: nothing. Kept weights make up for them by an `update` on the preserved samples of the choosing half.
    """

    units: tuple[str, ...] = UNITS
    budget: float = 0.003
    harm: float = 0.01
    score: str = "contrast"
    estimator: str = "gradient"
    rounds: int = 3
    weights: bool = False
    certain: bool = False
    damp: float = 0.0
    update: Update = "none"
    seed: int = 0
    draws: int = 1
    max_batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if isinstance(self.units, str):  # of one kind
            object.__setattr__(self, "units", (self.units,))
        for what, value, known in (
            ("score", self.score, SCORES),
            ("estimator", self.estimator, ESTIMATORS),
            ("update", self.update, UPDATES),
        ):
            if value not in known:
                raise unknown(what, value, known)
        if not (0 < self.budget < 1 or self.budget == self.budget // 1 > 0):
            raise OptionError(
                f"a budget is a share below 1 or a whole number, as 0.3% or 100, not {self.budget:g}"
            )
        if self.budget >= 1:
            object.__setattr__(self, "budget", int(self.budget))
        if not self.harm > 0:
            raise OptionError(f"harm must be above 0, as 1% or 0.01nats, not {100 * self.harm:.3g}%")
        if self.rounds < 1:
            raise OptionError(f"there must be at least 1 round, not {self.rounds}")
        if not 0 <= self.damp < 1:
            raise OptionError(f"damp is what is left, at least 0 and below 1, not {self.damp:g}")
        self._check_together()

    def _check_together(self) -> None:
        """Raise `OptionError` for options that exclude each other."""
        if self.damp and self.update != "none":
            raise OptionError(
                f"an update makes up for zeros, and damp leaves none: leave out --update {self.update}, or --damp"
            )
        if self.weights and self.units != UNITS:
            raise OptionError(
                f"single weights are taken of all matrices, not of {' and '.join(self.units)} alone: leave out --units, or --weights"
            )
        if self.weights and self.score in ACTIVE:
            raise OptionError(
                f"{self.score!r} looks at what units send, which single weights do not: leave out --weights"
            )
        if self.weights and self.estimator == "integrated":
            raise OptionError(
                "integrated closes units little by little: for single weights take gradient or relevance"
            )

    @property
    def anew(self) -> bool:
        """Whether every round chooses anew, and what was chosen before may come back: by `contrast`, of units."""
        return self.score == "contrast" and not self.weights

    @property
    def limit_nats(self) -> float:
        """What the harm to each preserved source may be."""
        return math.log1p(self.harm)

    def how(self) -> Estimator:
        """Return the estimator."""
        return Estimator(
            self.estimator,  # type: ignore[arg-type]
            draws=max(self.draws, 1),
            seed=self.seed,
            max_batch_tokens=self.max_batch_tokens,
        )

    def number(self, candidates: int) -> int:
        """Return how many of the candidates may go; `OptionError` where that is none, or more than half."""
        own = math.floor(self.budget * candidates + 1e-9) if self.budget < 1 else int(self.budget)
        shown = f"{self.budget:.3%}" if self.budget < 1 else f"{self.budget:,.0f}"
        what = "weights" if self.weights else "units"
        if own < 1:
            step = 10.0 ** (math.floor(math.log10(100 / candidates)) - 2)
            raise OptionError(
                f"a budget of {shown} of {candidates:,} {what} is less than one: ask for at least "
                f"{math.ceil(100 / candidates / step) * step:.3g}%, or for a number"
            )
        if own > candidates / 2:
            raise OptionError(
                f"a budget of {shown} is more than half of {candidates:,} {what}: that is no targeted correction; ask for less"
            )
        return own


@dataclass(frozen=True)
class Point:
    """What a model without so many candidates was measured to do on the deciding half.

    `benefit` is the fall of the mean log-odds of the undesired tokens (against what should be said instead where that is
    given), `harm` by source the rise of the loss in nats per token, `kl` the divergence from the model before. The harm to clean
    texts of the model's own is that divergence: it took the likeliest token everywhere, so that any other model's loss is higher.
    `predicted` is the largest divergence of a source as it was expected, NaN for scores that expect none. `round` is the one
    that chose them, 0 for none.
    """

    count: int
    share: float
    weights: int
    round: int
    benefit: Value
    harm: Mapping[str, Value]
    kl: Mapping[str, Value]
    predicted: float

    def worst(self, *, certain: bool = False) -> float:
        """Return the largest harm of a source, by its value or by the upper end of its interval; NaN where one of them is."""
        harms = [own.high if certain else own.value for own in self.harm.values()]
        return math.nan if any(map(math.isnan, harms)) else max(harms, default=0.0)


@dataclass(frozen=True, eq=False, repr=False)
class Corrected(Shown):
    """What was taken out of a model, and what that does.

    `keep[name]` is True where a weight stays, on top of what was zero before. `curve` has all that was measured on the way,
    `chosen` what was taken, before an update; `after` what the model does now. `members` are the units that went, none for
    single weights. `halves` say by number and hash which samples chose and which decided; `pairs` are the values of each of the
    latter, before and after.
    """

    contrast: Contrast
    keep: Masks
    chosen: Point
    after: Point
    curve: tuple[Point, ...]
    members: tuple[Unit, ...]
    candidates: int
    halves: Mapping[str, Any]
    model_fingerprint: str
    pairs: tuple[tuple[EvalResult, ...], tuple[EvalResult, ...]] = ((), ())
    effects: None = None

    @property
    def what(self) -> str:
        """What was taken out, in words."""
        kinds = dict.fromkeys(name.partition(":")[0].replace("_", " ") for name in self.contrast.units)
        name = "weights" if self.contrast.weights else " and ".join(kinds)
        verb = f"scaled to {self.contrast.damp:g}" if self.contrast.damp else "set to zero"
        return f"{self.chosen.count:,} of {self.candidates:,} ({name}) {verb}"

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint's manifest says of it."""
        own = self.contrast
        plain = {key: value for key, value in asdict(own).items() if value is not False and key != "weights"}
        names = "weights" if own.weights else ", ".join(own.units)
        method = {"criterion": f"correct:{own.score}", **plain, "units": names}
        return {"method_version": METHOD_VERSION, "method": method, "correction": self.described()}

    def described(self) -> dict[str, Any]:
        """Return all numbers as plain values."""
        return {
            "what": self.what,
            "candidates": self.candidates,
            "contrast": asdict(self.contrast),
            "halves": dict(self.halves),
            "chosen": asdict(self.chosen),
            "after": asdict(self.after),
            "curve": [asdict(point) for point in self.curve],
            "members": [[unit.layer, unit.index, unit.kind] for unit in self.members],
            "model_fingerprint": self.model_fingerprint,
        }

    def __repr__(self) -> str:
        return (
            f"Corrected({self.what}; log-odds of what is undesired {-self.after.benefit.value:+.3g} "
            f"[{-self.after.benefit.high:+.3g}, {-self.after.benefit.low:+.3g}], harm to what is to stay at most {self.after.worst():+.3g} nats)"
        )
