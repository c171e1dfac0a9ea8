"""Optimal Brain Surgeon on one matrix: what the kept weights do to make up for those that go.

All three functions see a linear map `y = W x` and second moments of its inputs over calibration tokens,
`H = Σ x xᵀ`. They are pure, and work in float32 on the device of their arguments.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causalprune.core import ModelError

BLOCK = 128
"""Columns whose masks are chosen together, and whose updates reach the columns after them at once."""
DAMPING = 0.01
"""Share of the mean diagonal of H that is added to its diagonal (Frantar & Alistarh 2023)."""

REFIT_DAMPING = 0.3
"""Share of the median diagonal of H that `refit` adds to its diagonal."""
ITERATIONS = 30
"""Steps of `refit` at most."""
SETTLED = 1e-3
"""It ends when a step takes less of the squared error than this share of what all steps before took."""
TINY = 1e-30
"""Below this a row is solved: no step is left."""

Choose = Callable[[Float[Tensor, "out group"], int], Bool[Tensor, "out group"]]
"""From the scores of neighbouring columns and the index of their first: what stays."""


def inverse_factor(hessian: Float[Tensor, "in in"], damping: float, name: str) -> Float[Tensor, "in in"]:
    """Return U, upper triangular, with `UᵀU = (H + damping · mean(diag H) · 1)⁻¹`.

    Features that never had an input have the damping alone; where none had, it is relative to one.

    Raises:
        ModelError: H is not positive definite with this damping; names one that would do.
    """
    scale, factor = float(hessian.diagonal().mean()) or 1.0, damping
    while True:
        own = hessian.float().clone()
        own.diagonal().add_(factor * scale)
        own, failed = torch.linalg.cholesky_ex(own)
        if not int(failed):
            break
        factor = max(10 * factor, 1e-4)
        if not factor < 1e4:
            raise ModelError(f"{name}: second moments of its inputs are not finite")
    if factor != damping:
        raise ModelError(
            f"{name}: second moments of its inputs are not positive definite with damping {damping:g}: "
            f"use more calibration tokens, or --damping {factor:g} (in a recipe: damping)"
        )
    own = torch.cholesky_inverse(own)  # one matrix of this size less in memory at a time
    upper: Tensor = torch.linalg.cholesky(own, upper=True)
    return upper


def sparsegpt(
    weight: Float[Tensor, "out in"],
    upper: Float[Tensor, "in in"],
    choose: Choose,
    *,
    group: int = BLOCK,
    rows: Float[Tensor, "out"] | None = None,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Prune column by column; what a weight took with it is made up for by the columns after it.

    `choose` sees the scores `w² / U_jj²` of `group` columns at a time, whose weights have been updated
    for everything before them (SparseGPT, Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1); `rows` says how much
    the error of each output counts there, all alike without. The scores may be a strided view. Costs `out · in²` multiplications.
    """
    # Transposed: every column is one piece of memory.
    found = weight.float().T.clone(memory_format=torch.contiguous_format)
    keep = torch.ones_like(found, dtype=torch.bool)
    width = BLOCK // group * group if group < BLOCK else group
    for start in range(0, len(found), width):
        block, stays = found[start : start + width], keep[start : start + width]
        own, scale = upper[start : start + width], upper.diagonal()[start : start + width, None]
        errors, dropped = torch.empty_like(block), torch.empty_like(block)
        for j, column in enumerate(block):
            if j % group == 0:
                at = slice(j, j + group)
                scores = (block[at] / scale[at]).square()
                scores = scores if rows is None else scores * rows
                stays[at] = choose(scores.T, start + j).T
                dropped[at] = ~stays[at] / scale[at]  # 1 / U_jj where a weight goes, else 0
            torch.mul(column, dropped[j], out=errors[j])
            block[j + 1 :].addr_(own[j, start + j + 1 : start + width], errors[j], alpha=-1)
        block.masked_fill_(~stays, 0.0)
        found[start + width :].addmm_(own[:, start + width :].T, errors, alpha=-1)
    return found.T.contiguous(), keep.T.contiguous()


def sparsegpt_stack(
    weights: Float[Tensor, "expert out in"],
    uppers: Float[Tensor, "expert in in"],
    choose: Sequence[Choose],
    *,
    group: int = BLOCK,
    rows: Float[Tensor, "expert out"] | None = None,
) -> tuple[Float[Tensor, "expert out in"], Bool[Tensor, "expert out in"]]:
    """Prune small matrices as `sparsegpt` does, several at once: a column of each is one piece of work."""
    found = weights.float().mT.contiguous()
    keep = torch.ones_like(found, dtype=torch.bool)
    diagonals = uppers.diagonal(dim1=1, dim2=2)
    width = BLOCK // group * group if group < BLOCK else group
    for start in range(0, found.shape[1], width):
        block, stays = found[:, start : start + width], keep[:, start : start + width]
        own, scale = uppers[:, start : start + width], diagonals[:, start : start + width, None]
        errors, dropped = torch.empty_like(block), torch.empty_like(block)
        for j in range(block.shape[1]):
            if j % group == 0:
                at = slice(j, j + group)
                scores = (block[:, at] / scale[:, at]).square()
                scores = scores if rows is None else scores * rows[:, None]
                for stay, score, chosen in zip(stays, scores, choose, strict=True):
                    stay[at] = chosen(score.T, start + j).T
                dropped[:, at] = ~stays[:, at] / scale[:, at]
            torch.mul(block[:, j], dropped[:, j], out=errors[:, j])
            ahead = own[:, j, start + j + 1 : start + width, None]
            block[:, j + 1 :].addcmul_(ahead, errors[:, j, None], value=-1)
        block.masked_fill_(~stays, 0.0)
        for rest, upper, error in zip(found[:, start + width :], own, errors, strict=True):
            rest.addmm_(upper[:, start + width :].T, error, alpha=-1)
    return found.mT.contiguous(), keep.mT.contiguous()


def incomplete(keep: Bool[Tensor, "out in"]) -> bool:
    """Tell whether any row loses some of its weights and keeps others: only those can make up for something."""
    return bool((keep.any(1) & ~keep.all(1)).any())


def refit(
    weight: Float[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    damping: float = REFIT_DAMPING,
    start: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out in"]:
    """Return the kept weights that best give the output of the whole matrix back.

    Minimises `tr (W − Ŵ) (H + damping · median(diag H) · 1) (W − Ŵ)ᵀ` over Ŵ that is zero outside `keep`, by
    conjugate gradients on each row from `start` on, W itself without, preconditioned by the diagonal. The damping draws
    Ŵ towards W; its median is over features that had an input.
    Costs `ITERATIONS · out · in²` multiplications at most.
    """
    stays, hessian = keep.float(), hessian.float().clone()
    had = hessian.diagonal()[hessian.diagonal() > 0]
    hessian.diagonal().add_(damping * had.median().nan_to_num(0.0))
    diagonal = hessian.diagonal().clamp_min(TINY)
    found = (weight if start is None else start).float() * stays
    residual = ((weight.float() - found) @ hessian) * stays
    scaled = residual / diagonal
    step, energy, gained = scaled, (residual * scaled).sum(1, keepdim=True), 0.0
    for _ in range(ITERATIONS):
        image = (step @ hessian) * stays
        length = energy / (step * image).sum(1, keepdim=True).clamp_min(TINY)
        gain = float((length * energy).sum())
        gained += gain
        found, residual = found + length * step, residual - length * image
        if gain <= SETTLED * gained:
            break
        scaled = residual / diagonal
        before, energy = energy, (residual * scaled).sum(1, keepdim=True)
        step = scaled + energy / before.clamp_min(TINY) * step
    return found
