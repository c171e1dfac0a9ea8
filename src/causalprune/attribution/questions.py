"""What is asked of a model's parts, and how the answer may be estimated."""

from dataclasses import dataclass
from typing import Literal

from causalprune.core import Effect, OptionError, unknown

Ablation = Literal["zero", "mean", "resample", "counterfactual"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "mean", "resample", "counterfactual")
Named = Literal["exact", "gradient", "adaptive", "integrated", "relevance"]
ESTIMATORS: tuple[Named, ...] = ("exact", "gradient", "adaptive", "integrated", "relevance")
GATES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where `integrated` takes derivatives: on the way from all units removed to the intact model."""

DEFAULT_BUDGET = 20.0
"""Share of the naive cost, as its inverse, that `adaptive` may spend where no budget is given."""


@dataclass(frozen=True)
class Question:
    """What is measured: which units, by which effect, and what takes the place of what is removed.

    `effect` is the rise of the cross-entropy (`ce`, the paper) or the KL divergence from the intact
    model's predictions (`kl`: never negative, less noisy). `ablation` puts there zeros (the paper), the
    mean over the calibration's positions, what another example of the batch has at that position, or what the example's own
    `counterfactual` has there.
    """

    units: tuple[str, ...] = ("heads",)
    effect: Effect = "ce"
    ablation: Ablation = "zero"

    def __post_init__(self) -> None:
        if isinstance(self.units, str):  # of one kind
            object.__setattr__(self, "units", (self.units,))
        for name, value, known in (
            ("effect", self.effect, ("ce", "kl")),
            ("ablation", self.ablation, ABLATIONS),
        ):
            if value not in known:
                raise unknown(name, value, known)


@dataclass(frozen=True)
class Estimator:
    """How effects are estimated, and how much that may cost.

    `budget` is how many times cheaper than naive (one whole forward pass per unit and sequence) `adaptive`
    has to be; with `until_certain` it stops as soon as the top fifth of the units is settled at 95 %. `draws`
    is how often labels are drawn for the second-order term of predictions, `gates` where derivatives are taken: `integrated`
    stands for `gradient` at five. `relevance` is AttnLRP (`interventions.lrp`), in logits of the targets, not in nats; LRP
    is patented, and whether that matters is the user's to judge.
    In `epochs` over the problems the order of a circuit is learned after scoring; effects know nothing of that.
    A forward pass holds `max_batch_tokens`; inputs of layers are kept up to `cache_gib`, else computed again.
    `share` (i, n) measures the i-th of n parts of the jobs alone: for runs side by side, joined by `merging.merge`.
    """

    name: Named = "exact"
    budget: float | None = None
    until_certain: bool = False
    draws: int = 1
    gates: tuple[float, ...] = (1.0,)
    epochs: int | None = None
    seed: int = 0
    max_batch_tokens: int = 2048
    cache_gib: float = 1.0
    share: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if self.name == "integrated":
            object.__setattr__(self, "name", "gradient")
            object.__setattr__(self, "gates", GATES if self.gates == (1.0,) else self.gates)
        if not 1 <= self.share[0] <= self.share[1]:
            raise OptionError(
                f"share {self.share[0]}/{self.share[1]}: the first number counts from 1 to the second"
            )
        if self.share[1] > 1 and self.name != "exact":
            raise OptionError(f"only the estimator 'exact' can be shared out, not {self.name!r}")
        if self.name not in ESTIMATORS:
            raise unknown("estimator", self.name, ESTIMATORS)
        if self.budget is not None and not self.budget > 1:
            raise OptionError(f"budget must be how many times cheaper than naive, above 1, not {self.budget}")
        if (self.budget is not None or self.until_certain) and self.name != "adaptive":
            raise OptionError(f"a budget belongs to the estimator 'adaptive', not to {self.name!r}")
        if not self.gates or not all(0 <= gate <= 1 for gate in self.gates) or self.draws < 0:
            raise OptionError("gates must lie between 0 and 1, and draws must not be negative")


UNPAIRED = (
    "ablation 'counterfactual' needs a counterfactual of every example: a file whose lines have one, or ioi"
)


def check_together(question: Question, how: Estimator) -> None:
    """Raise `OptionError` for a question that an estimator does not answer, whatever the model is."""
    if question.ablation == "resample" and how.name == "adaptive":
        raise OptionError("ablation 'resample' needs another estimator than 'adaptive', as 'exact'")
    if how.name == "relevance" and question.effect == "kl":
        raise OptionError("relevance is about the target tokens: it needs the effect 'ce', not 'kl'")
    if how.draws < 1 and (how.name == "adaptive" or (how.name, question.effect) == ("gradient", "kl")):
        raise OptionError(f"the estimator {how.name!r} of {question.effect!r} needs draws ≥ 1")


ELSEWHERE = ("cache_gib", "share", "epochs")
"""Fields of an estimator that change where and when values are computed, and not the values."""
