"""Experts in batches: what SparseGPT does to small matrices takes long because each is many small pieces of work."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from causalprune.core import Layer, Projection
from causalprune.pruning.obs import Choose, sparsegpt_stack
from causalprune.pruning.scores import inverse, slope
from causalprune.pruning.walks import Gathered, Plan

Solved: TypeAlias = tuple[Tensor | None, Tensor | None]
"""Weights after the update, and what stays; None where it is not known yet."""
AT_ONCE = 2**21
"""Weights of all matrices that are solved together, at most: they stay in the processor's cache."""


class Stacks:
    """Weights and what stays of a layer, as far as they are known before a matrix has its turn.

    What stays may be `fixed`. Experts are solved by SparseGPT in batches when the first of one is asked for; matrices of an
    expert that read the same inputs (gate and up) are solved as one, each with its own share.
    """

    def __init__(
        self,
        plan: Plan,
        gathered: Gathered,
        layer: Layer,
        choose: Mapping[str, Choose],
        fixed: Iterator[Tensor] | None,
    ) -> None:
        self._plan, self._gathered, self._choose, self._fixed = plan, gathered, choose, fixed
        self._batches: dict[str, Sequence[list[Projection]]] = {}
        self._solved: dict[str, Solved] = {}
        if fixed is None and "moments" in plan.method.needs:
            self._find_batches(layer)

    def _find_batches(self, layer: Layer) -> None:
        gathered = self._gathered
        seen, tokens = gathered.moments.hessians, gathered.moments.tokens
        groups: dict[tuple[int, int], list[Projection]] = {}
        for p in layer.projections:
            if p.expert is not None and tokens.get(p.name):  # others are solved one by one
                groups.setdefault((p.expert, id(seen[p.name])), []).append(p)
        by_shape: dict[object, list[list[Projection]]] = {}
        for group in groups.values():
            by_shape.setdefault(tuple((p.role, p.shape) for p in group), []).append(group)
        for alike in by_shape.values():
            size = max(AT_ONCE // sum(p.size for p in alike[0]), 1)
            for at in range(0, len(alike) if size > 1 else 0, size):
                batch = alike[at : at + size]
                self._batches |= {p.name: batch for group in batch for p in group}

    def take(self, p: Projection) -> Solved:
        """Return what is known of a matrix, once."""
        if p.name not in self._batches:
            return None, None if self._fixed is None else next(self._fixed)
        if p.name not in self._solved:
            self._solve(self._batches[p.name])
        return self._solved.pop(p.name)

    def _solve(self, batch: Sequence[list[Projection]]) -> None:
        plan, gathered = self._plan, self._gathered
        weights = torch.stack([torch.cat([p.read() for p in group]) for group in batch])
        uppers = torch.stack([inverse(plan, gathered, group[0]) for group in batch])
        slopes = [[slope(plan, gathered, p) for p in group] for group in batch]
        rows = torch.stack([torch.cat(own) for own in slopes]) if slopes[0][0] is not None else None  # type: ignore[arg-type]
        choose = [self._each(group) for group in batch]
        found, keep = sparsegpt_stack(weights, uppers, choose, group=plan.method.group, rows=rows)
        for group, own, stays in zip(batch, found, keep, strict=True):
            sizes = [p.shape[0] for p in group]
            for p, weight, left in zip(group, own.split(sizes), stays.split(sizes), strict=True):
                self._solved[p.name] = weight, left

    def _each(self, group: Sequence[Projection]) -> Choose:
        sizes, own = [p.shape[0] for p in group], [self._choose[p.name] for p in group]

        def choose(scores: Tensor, start: int) -> Tensor:
            parts = zip(own, scores.split(sizes), strict=True)
            return torch.cat([chosen(part, start) for chosen, part in parts])

        return choose
