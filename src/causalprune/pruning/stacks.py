"""Experts in batches: what SparseGPT does to small matrices takes long because each is many small pieces of work."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from causalprune.core import Layer, Projection
from causalprune.pruning.obs import Choose, sparsegpt_stack
from causalprune.pruning.scores import inverse, slope
from causalprune.pruning.walks import Gathered, Plan

AT_ONCE = 2**21
"""Weights of all matrices that are solved together, at most: they stay in the processor's cache."""
Solved = tuple[Tensor, Tensor]


class Stacks:
    """Weights and what stays of the experts of a layer, solved in batches when the first of one is asked for.

    Matrices of an expert that read the same inputs (gate and up) are solved as one, each with its own share.
    """

    def __init__(
        self, plan: Plan, gathered: Gathered, layer: Layer, choose: Callable[[Projection], Choose]
    ) -> None:
        self._plan, self._gathered, self._choose = plan, gathered, choose
        seen, tokens = gathered.moments.hessians, gathered.moments.tokens
        groups: dict[tuple[int, int], list[Projection]] = {}
        for p in layer.projections:
            if p.expert is not None and tokens.get(p.name):  # others are solved one by one
                groups.setdefault((p.expert, id(seen[p.name])), []).append(p)
        by_shape: dict[object, list[list[Projection]]] = {}
        for group in groups.values():
            by_shape.setdefault(tuple((p.role, p.shape) for p in group), []).append(group)
        self._batches: dict[str, Sequence[list[Projection]]] = {}
        for alike in by_shape.values():
            size = max(AT_ONCE // sum(p.size for p in alike[0]), 1)
            for at in range(0, len(alike) if size > 1 else 0, size):
                batch = alike[at : at + size]
                self._batches |= {p.name: batch for group in batch for p in group}
        self._solved: dict[str, Solved] = {}

    def take(self, p: Projection) -> Solved | None:
        """Return a matrix solved with others, once; None where it is to be solved alone."""
        if p.name not in self._batches:
            return None
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
        sizes, own = [p.shape[0] for p in group], [self._choose(p) for p in group]

        def choose(scores: Tensor, start: int) -> Tensor:
            parts = zip(own, scores.split(sizes), strict=True)
            return torch.cat([chosen(part, start) for chosen, part in parts])

        return choose
