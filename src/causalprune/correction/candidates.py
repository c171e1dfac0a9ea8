"""What may be taken out of a model, units or single weights: their slopes, and the model without some of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causalprune.circuits import Behaviour
from causalprune.core import Batch, Decoder, Masks, Projection, Unit
from causalprune.interventions import Asked, Parts, Site, gate_slopes, gated, ruled, weight_slopes
from causalprune.pruning import close, dampen, scale, scaled, size_of_parts, staying, staying_weights, still

Chosen = Int[Tensor, "_"]
"""Numbers of candidates."""
Rows = Callable[[int], AbstractContextManager[Any]]
"""What is to be open while a pass of so many sequences runs."""


class Candidates(Protocol):
    """What may be taken out, numbered."""

    @property
    def factor(self) -> float:
        """What is left of it, 0 where it is closed."""

    @property
    def decoder(self) -> Decoder:
        """The model."""

    @property
    def count(self) -> int:
        """Number of candidates."""

    @property
    def alive(self) -> Bool[Tensor, "candidate"]:
        """Which of them are not zero already."""

    @property
    def magnitude(self) -> Float[Tensor, "candidate"]:
        """Root mean square of the weights of each."""

    def weights(self, chosen: Chosen) -> int:
        """Return how many weights some of them have."""

    def slopes(
        self, batch: Batch, asked: Asked, closed: Chosen, gate: float, *, relevant: bool
    ) -> Float[Tensor, "candidate batch"]:
        """Return the slopes of what is asked of each sequence at every candidate's gate, with some closed."""

    def without(self, chosen: Chosen) -> AbstractContextManager[Rows]:
        """Give out what opens passes of the model without some; afterwards it is as it was."""

    def keep(self, chosen: Chosen) -> Masks:
        """Return which weights would not be zero without some: all of them where something is left of those."""

    def still(self, chosen: Chosen) -> None:
        """Take out of the model what some send without a weight."""

    def write(self, chosen: Chosen) -> None:
        """Take some out of the model for good."""


@dataclass(frozen=True, eq=False)
class Units:
    """Units of a model, as a behaviour on some problems lists them."""

    of: Behaviour
    factor: float = 0.0

    @property
    def decoder(self) -> Decoder:
        """The model."""
        return self.of.decoder

    @property
    def units(self) -> Sequence[Unit]:
        """All units, in the model's order."""
        return self.of.units

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.of.plan.units)

    @cached_property
    def alive(self) -> Bool[Tensor, "unit"]:
        """Which units send anything: some weight of theirs in an output projection is not zero."""
        return self._summed(_squares, sent=True) > 0

    @cached_property
    def magnitude(self) -> Float[Tensor, "unit"]:
        """Root mean square of the weights that are each unit's alone."""
        return (self._summed(_squares) / self._summed(_ones).clamp_min(1.0)).sqrt()

    def _summed(
        self, of: Callable[[Projection], Float[Tensor, "out in"]], *, sent: bool = False
    ) -> Float[Tensor, "unit"]:
        """Return sums over the weights that a unit has alone, or over those of output projections."""
        sums = {site: torch.zeros(n, dtype=torch.float64) for site, n in self.of.plan.sites.items()}
        for p in self.decoder.projections:
            if not sent or p.role in ("o", "down"):
                _add(sums[Site(p.layer, p.place)], p, of(p))
        found = torch.zeros(self.count, dtype=torch.float64)
        for site, (index, owner) in self.of.places.items():
            found.index_add_(0, owner, sums[site][index])
        return found

    def weights(self, chosen: Chosen) -> int:
        """Return how many weights some units have, but for those that others need too."""
        return size_of_parts(self.decoder, self._parts(chosen))

    def _gates(self, closed: Chosen, gate: float = 1.0) -> dict[Site, Float[Tensor, "part"]]:
        keep = torch.ones(self.count, dtype=torch.bool)
        keep[closed] = False
        found = self.of.gates(keep, gate)
        if self.factor:
            for site, open_ in self.of.gates(keep).items():
                found[site] = found[site] + (1 - open_) * self.factor
        return found

    def slopes(
        self, batch: Batch, asked: Asked, closed: Chosen, gate: float, *, relevant: bool
    ) -> Float[Tensor, "unit batch"]:
        """Return the slopes of what is asked of each sequence at every unit's gate, with some closed."""
        units = list(self.of.plan.units.values())
        with ruled(self.decoder) if relevant else nullcontext():
            return gate_slopes(self.decoder, batch, units, asked, gate=self._gates(closed, gate))

    @contextmanager
    def without(self, chosen: Chosen) -> Iterator[Rows]:
        """Give out what opens passes of the model without some units."""
        gates = {site: own for site, own in self._gates(chosen).items() if bool((own != 1).any())}
        yield lambda rows: gated(self.decoder, {site: own.expand(rows, -1) for site, own in gates.items()})

    def _parts(self, chosen: Chosen) -> list[Parts]:
        every = list(self.of.plan.units.values())
        return [every[number] for number in chosen.tolist()]

    def keep(self, chosen: Chosen) -> Masks:
        """Return which weights would not be zero without some units."""
        return staying(self.decoder, [] if self.factor else self._parts(chosen))

    def still(self, chosen: Chosen) -> None:
        """Set to zero, or scale, what some units send without a weight."""
        still(self.decoder, self._parts(chosen), self.factor)

    def write(self, chosen: Chosen) -> None:
        """Set all weights of some units to zero, or scale what they send."""
        if self.factor:
            dampen(self.decoder, self._parts(chosen), self.factor)
        else:
            close(self.decoder, self._parts(chosen))


def _squares(p: Projection) -> Float[Tensor, "out in"]:
    return p.read().detach().double().square().cpu()


def _ones(p: Projection) -> Float[Tensor, "out in"]:
    return torch.ones(1, 1, dtype=torch.float64).expand(p.shape)


def _add(found: Float[Tensor, "part"], p: Projection, values: Float[Tensor, "out in"]) -> None:
    """Add up values of a projection's weights that belong to one part alone."""
    n = len(found)
    if p.place == "experts":
        found[int(p.name.split(".")[3])] += values.sum()
    elif p.role in ("o", "down"):
        found += values.sum(0).view(n, -1).sum(1)
    elif p.place in ("mlp", "shared") or p.blocks == n:
        found += values.sum(1).view(n, -1).sum(1)


@dataclass(frozen=True, eq=False)
class Weights:
    """All single weights of the projections, in their order, row by row."""

    decoder: Decoder
    factor: float = 0.0

    @cached_property
    def starts(self) -> Mapping[str, int]:
        """The number of the first weight of every projection."""
        found, at = {}, 0
        for p in self.decoder.projections:
            found[p.name] = at
            at += p.size
        return found

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(p.size for p in self.decoder.projections)

    @property
    def alive(self) -> Bool[Tensor, "weight"]:
        """Which weights are not zero."""
        return self.magnitude != 0

    @property
    def magnitude(self) -> Float[Tensor, "weight"]:
        """Size of every weight."""
        return torch.cat([p.read().float().abs().flatten().cpu() for p in self.decoder.projections])

    def weights(self, chosen: Chosen) -> int:
        """Return how many weights those are."""
        return len(chosen)

    def _index(self, chosen: Chosen) -> dict[str, Int[Tensor, "_"]]:
        own = chosen.sort().values
        found = {}
        for p in self.decoder.projections:
            start = self.starts[p.name]
            low, high = torch.searchsorted(own, torch.tensor([start, start + p.size])).tolist()
            if high > low:
                found[p.name] = own[low:high] - start
        return found

    def slopes(
        self, batch: Batch, asked: Asked, closed: Chosen, gate: float, *, relevant: bool
    ) -> Float[Tensor, "weight 1"]:
        """Return weight times gradient of what is asked of one sequence, with some closed."""
        assert len(batch.tokens) == 1, "gradients of weights are sums over a batch"
        with scaled(self.decoder, self._index(closed), self.factor):
            slopes = weight_slopes(self.decoder, [batch], relevant=relevant, asked=asked)
            found = []
            for p in self.decoder.projections:
                own = slopes.get(p.parameter)
                if own is None:  # an expert that no token reached
                    found.append(torch.zeros(p.size))
                    continue
                slope = replace(p, parameter=nn.Parameter(own, requires_grad=False)).read()
                found.append((slope.float() * p.read().float()).flatten().cpu())
        return torch.cat(found)[:, None]

    @contextmanager
    def without(self, chosen: Chosen) -> Iterator[Rows]:
        """Give out what opens passes of the model without some weights."""
        with scaled(self.decoder, self._index(chosen), self.factor):
            yield lambda _: nullcontext()

    def keep(self, chosen: Chosen) -> Masks:
        """Return which weights would not be zero without some."""
        return staying_weights(self.decoder, {} if self.factor else self._index(chosen))

    def still(self, chosen: Chosen) -> None:
        """Do nothing: single weights send nothing without a weight."""

    def write(self, chosen: Chosen) -> None:
        """Set some weights to zero, or scale them."""
        scale(self.decoder, self._index(chosen), self.factor)
