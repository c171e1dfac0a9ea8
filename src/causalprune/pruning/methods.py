"""What names a way to prune: criterion, scope, update and sparsity."""

import re
from dataclasses import dataclass

from causalprune.calibration import FEW
from causalprune.core import OptionError, unknown
from causalprune.pruning.criteria import (
    BUDGETS,
    CRITERIA,
    LOOKS,
    SCOPES,
    SENSITIVE,
    TRAINS,
    UPDATES,
    Budgets,
    Need,
    Update,
)
from causalprune.pruning.grading import DOSES, FUSED, doses
from causalprune.pruning.obs import BLOCK, DAMPING
from causalprune.pruning.training import epochs

SLOPE_PASSES = 3
"""What gradients at all outputs cost, in forward passes: two forward, and one back."""
WEIGHT_PASSES = 4
"""What gradients at all weights cost: as those, and a product for each matrix."""
N_OF_M = re.compile(r"([1-9]\d*):([1-9]\d*)")


def pattern_sparsity(scope: str) -> float | None:
    """Return the sparsity of a pattern such as `2:4` (of 4 neighbouring inputs 2 stay), None for other scopes."""
    found = N_OF_M.fullmatch(scope)
    if found is None or not int(found[1]) < int(found[2]) <= BLOCK:
        return None
    return 1 - int(found[1]) / int(found[2])


@dataclass(frozen=True)
class Method:
    """A criterion, a scope, an update and a sparsity: everything that names a way to prune.

    `sparsity` is the fraction of the pool's weights set to zero, between 0 and 1. `scope` says among which
    weights scores are compared: `row`, `matrix` (sparsegpt: each block of 128 columns), `global`, or
    a pattern such as `2:4`, where of 4 neighbouring inputs 2 stay (its sparsity must be 0.5). `update` is what kept
    weights do for those that go: nothing (`none`), make up for them column by column (`obs`), be fitted anew to the
    outputs matrix by matrix (`refit`), or after that be trained on the intact model's predictions (`distill`; `adam` with
    another optimizer, at eight bytes a weight).
    `budgets` are the same share for all matrices (`uniform`), or more where graded interventions show that the task
    can spare more (`graded`; not with scope `global`). A pattern cannot give a matrix more or less: there `graded` lets
    those stay dense that the task needs most, until no more than `sparsity` has to go, which must be less than the
    pattern's. Where scope or update are None, the criterion's own holds, and budgets are `uniform`. `damping` is what SparseGPT
    and `obs` add to the diagonal of the inputs' second moments, as a share of its mean.
    """

    criterion: str
    sparsity: float
    scope: str | None = None
    seed: int = 0
    update: str | None = None
    budgets: str | None = None
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise unknown("method", self.criterion, CRITERIA)
        pattern = pattern_sparsity(self.scope or "")
        if self.scope is not None and self.scope not in SCOPES and pattern is None:
            raise unknown("scope", self.scope, [*SCOPES, "2:4"])
        if self.update is not None and self.update not in UPDATES:
            raise unknown("update", self.update, UPDATES)
        if self.budgets is not None and self.budgets not in BUDGETS:
            raise unknown("budgets", self.budgets, BUDGETS)
        if self.budgets == "graded" and self.resolved_scope == "global":
            raise OptionError("graded budgets need scores compared within rows or matrices, not global")
        if not 0 <= self.damping < float("inf"):
            raise OptionError(f"damping must be a number of at least 0, such as 0.01, not {self.damping:g}")
        if not 0 < self.sparsity < 1:
            raise OptionError(f"sparsity must be between 0 and 1 (both excluded), not {self.sparsity}")
        if pattern is not None and self.budgets == "graded" and self.sparsity >= pattern:
            raise OptionError(
                f"{self.scope} everywhere is a sparsity of {pattern:g}, which leaves graded budgets no choice of "
                f"what stays dense: ask for less than {pattern:g}"
            )
        if pattern is not None and self.budgets != "graded" and self.sparsity != pattern:
            less = (
                "; for less, add +graded, which lets matrices stay dense" if self.sparsity < pattern else ""
            )
            raise OptionError(f"{self.scope} is a sparsity of {pattern:g}, not {self.sparsity:g}{less}")

    @property
    def resolved_scope(self) -> str:
        """The scope asked for, or the criterion's own."""
        return self.scope or CRITERIA[self.criterion].scope

    @property
    def group(self) -> int:
        """How many neighbouring inputs SparseGPT chooses among at once: those of the pattern, or `BLOCK`."""
        pattern = N_OF_M.fullmatch(self.resolved_scope)
        return int(pattern[2]) if pattern else BLOCK

    @property
    def resolved_update(self) -> Update:
        """The update asked for, or the criterion's own."""
        return next((u for u in UPDATES if u == self.update), CRITERIA[self.criterion].update)

    @property
    def resolved_budgets(self) -> Budgets:
        """The budgets asked for, or the same for all."""
        return next((b for b in BUDGETS if b == self.budgets), "uniform")

    @property
    def doses(self) -> tuple[float, ...]:
        """The sparsities at which graded interventions prune a group: several, or that of the pattern."""
        pattern = pattern_sparsity(self.resolved_scope)
        return doses(self.sparsity) if pattern is None else (pattern,)

    @property
    def trials(self) -> int:
        """How often the examples of graded interventions go through the rest of the model for every layer."""
        if self.resolved_budgets == "uniform":
            return 0
        return 2 * len(DOSES) if pattern_sparsity(self.resolved_scope) is None else FUSED

    @property
    def needs(self) -> frozenset[Need]:
        """What the criterion looks at; gradients at outputs only where rows are compared with each other."""
        own = CRITERIA[self.criterion].needs
        return own if self.resolved_scope in ("matrix", "global") else own - {"slopes"}

    @property
    def needs_calibration(self) -> bool:
        """Whether inputs of matrices on calibration data are looked at."""
        return self.walks > 0

    @property
    def gradient_passes(self) -> int:
        """What gradients cost, in forward passes: none, at outputs, or at every weight."""
        return SLOPE_PASSES * ("slopes" in self.needs) + WEIGHT_PASSES * bool(self.needs & SENSITIVE)

    @property
    def takes_long(self) -> bool:
        """Whether there are gradients, interventions or training, which are worth keeping of a stopped run."""
        graded, trains = self.resolved_budgets == "graded", self.resolved_update in TRAINS
        return graded or trains or "slopes" in self.needs

    @property
    def walks(self) -> int:
        """How often the calibration tokens go through all layers.

        Once each for scores that must all be there before the first weight goes, for graded budgets, and for pruning
        where it looks at inputs or updates.
        """
        looks = bool(self.needs & LOOKS)
        updates, graded = self.resolved_update != "none", self.resolved_budgets == "graded"
        if self.resolved_scope == "global":
            return looks + updates
        return graded + int(looks or updates)

    def passes(self, layers: int, examples: int, tokens: int) -> float:
        """Return how many passes of all calibration tokens through the model pruning costs, a backward pass as two.

        Two for every walk; gradients go back once through every layer; trials of graded budgets take few examples,
        and enter at their layer; training takes three an epoch.
        """
        return (
            2 * self.walks
            + self.trials * (layers + 1) / 2 * min(FEW / examples, 1.0)
            + self.gradient_passes
            + (3 * epochs(tokens) if self.resolved_update in TRAINS else 0)
        )
