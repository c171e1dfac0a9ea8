"""What a weight is worth: pure functions of a matrix and what is known about it, in one literal dict.

Listing a function here makes it a choice of the command line and puts it under the shared tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Scope = Literal["row", "matrix", "global"]
SCOPES: tuple[Scope, ...] = ("row", "matrix", "global")
Update = Literal["none", "obs", "refit", "distill", "adam"]
UPDATES: tuple[Update, ...] = ("none", "obs", "refit", "distill", "adam")
"""What kept weights do for those that go: nothing, make up for them column by column, be fitted anew matrix by
matrix, or after that be trained together on the intact model's predictions, without or with memory for each weight."""
TRAINS: tuple[Update, ...] = ("distill", "adam")

Budgets = Literal["uniform", "graded"]
BUDGETS: tuple[Budgets, ...] = ("uniform", "graded")
"""How many weights groups of matrices lose: all the same share, or by what the task was measured to lose."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a criterion may look at besides the weights.

    `input_norm` is the root mean square of each input feature over calibration tokens, `inverse` the
    diagonal of the inverse of the inputs' second moments, `output_slope` the root mean square of the task's gradient at
    each output feature (None where rows are not compared), `factor` the
    importance of each weight's head (broadcastable to `[out in]`), `gradient` that of the task at each weight, plain or as
    relevance goes back, `seed` belongs to this matrix alone.
    """

    input_norm: Float[Tensor, "in"] | None = None
    inverse: Float[Tensor, "in"] | None = None
    output_slope: Float[Tensor, "out"] | None = None
    factor: Float[Tensor, "#out #in"] | None = None
    gradient: Float[Tensor, "#out #in"] | None = None
    seed: int = 0


Need = Literal["weights", "inputs", "moments", "slopes", "effects", "gradients", "relevance"]
SENSITIVE: frozenset[Need] = frozenset({"gradients", "relevance"})
"""Needs that are gradients at every weight, of the loss or of relevance."""
LOOKS: frozenset[Need] = SENSITIVE | {"inputs", "moments", "slopes"}
"""What criteria need that look at calibration data."""
Score = Callable[[Float[Tensor, "out in"], Evidence], Float[Tensor, "out in"]]


@dataclass(frozen=True)
class Criterion:
    """A scoring function, the evidence it needs, and its own scope of comparison and update."""

    score: Score
    scope: Scope
    needs: frozenset[Need]
    update: Update = "none"

    @property
    def by_value(self) -> bool:
        """Whether the score of a weight depends on |w| and its factor alone, and rises with |w|."""
        return bool(self.needs) and self.needs <= {"weights", "effects"}


def magnitude(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """|W| (Han et al. 2015, arXiv 1506.02626)."""
    return weight.abs().float()


def wanda(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """|W_ij| · ‖x_j‖, x the inputs of the matrix on calibration data (Sun et al. 2023, arXiv 2306.11695)."""
    assert evidence.input_norm is not None
    return weight.abs().float() * evidence.input_norm.float()


def cap(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """|W_ij| · I(region of i, j), I from the causal effect of heads (method §3, arXiv 2606.19350)."""
    assert evidence.factor is not None
    return weight.abs().float() * evidence.factor.float()


def sparsegpt(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """w_ij² / [H⁻¹]_jj, H the second moments of the inputs (Frantar & Alistarh 2023, arXiv 2301.00774).

    The rise of the squared error of the matrix's output when w_ij goes and its row makes up for it.
    """
    assert evidence.inverse is not None
    return weight.float().square() / evidence.inverse


def causal(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """SparseGPT's score times √E[g_i²]: errors of the outputs count by what the task's loss makes of them.

    The root, half way to the loss to second order: with E[g_i²] itself the rows whose gradients are small lose too much
    at once for a second order (docs/log.md has what was tried).
    """
    return sparsegpt(weight, evidence) * _rows(evidence)


def fisher(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """|W_ij| · √E[x_j²] · √E[g_i²], g the gradient of the task's loss at the output of the matrix.

    Half its square is what the loss rises to second order when w_ij goes: the diagonal of the empirical Fisher information,
    with inputs and gradients taken as independent (K-FAC, Martens & Grosse 2015, arXiv 1503.05671).
    """
    return wanda(weight, evidence) * _rows(evidence)


def _rows(evidence: Evidence) -> Float[Tensor, "out 1"] | float:
    return 1.0 if evidence.output_slope is None else evidence.output_slope.float()[:, None]


def snip(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """|w · ∂L/∂w|, L the task's loss (Lee et al. 2018, arXiv 1810.02340); with relevance's gradient |R| of the weight.

    The latter is attribution-guided pruning (Hatefi et al. 2025, arXiv 2506.13727, Eq. 4).
    """
    assert evidence.gradient is not None
    return (weight.float() * evidence.gradient.float()).abs()


def random(weight: Float[Tensor, "out in"], evidence: Evidence) -> Float[Tensor, "out in"]:
    """Uniform noise, the same for the same seed: the floor that every criterion has to beat."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, "matrix", frozenset({"weights"})),
    "wanda": Criterion(wanda, "row", frozenset({"inputs"})),
    "sparsegpt": Criterion(sparsegpt, "matrix", frozenset({"moments"}), update="obs"),
    "causal": Criterion(causal, "matrix", frozenset({"moments", "slopes"}), "distill"),
    "fisher": Criterion(fisher, "global", frozenset({"inputs", "slopes"})),
    "snip": Criterion(snip, "row", frozenset({"gradients"})),
    "relevance": Criterion(snip, "row", frozenset({"relevance"})),
    "cap": Criterion(cap, "global", frozenset({"weights", "effects"})),
    "random": Criterion(random, "matrix", frozenset()),
}
