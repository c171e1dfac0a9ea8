"""What is known of every candidate before anything is closed: slopes and activations on both sets, as means over samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causalprune.attribution import Estimator, balanced
from causalprune.calibration import batches
from causalprune.core import Batch, Example, Progress, State
from causalprune.correction.behaviours import CLEAN
from causalprune.correction.candidates import Candidates, Chosen, Units
from causalprune.correction.samples import Half
from causalprune.interventions import (
    Asked,
    Following,
    LayerInputs,
    Site,
    Targets,
    cross_entropy,
    drawn,
    last_hidden,
    likelihood,
    odds,
    prominence,
    seen,
    uniforms,
)

Set = Literal["undesired", "preserve"]
Kind = Literal["odds", "harm", "drift", "rise", "size", "square", "activity", "onset"]
"""Fall of the log-odds of undesired tokens when a candidate is closed; divergence to second order; fall of divergence and loss
per gate, from where the model is; rise of the loss, its size, its square; mean size of what is sent; that from the first
undesired token on less before."""
Need = tuple[Kind, Set]
Vector = Float[Tensor, "candidate"]
ODDS: Need = ("odds", "undesired")
HARM: Need = ("harm", "preserve")
DRIFT: Need = ("drift", "preserve")
BY_SOURCE = ("harm", "drift")
"""Kinds that are told source by source."""


@dataclass(frozen=True, eq=False)
class Looking:
    """How samples are looked at: who is looked at, on which half, by which estimator, in batches of how many tokens."""

    candidates: Candidates
    half: Half
    how: Estimator
    state: State

    def gather(self, need: Need, closed: Chosen, name: str, tell: Progress) -> Tensor:
        """Return what is needed of every candidate, from the state where it is finished there; `name` says what is closed.

        It is `[candidate]`, a mean over samples; of harm and drift `[source candidate]`, a mean over those of each source.
        """
        kind, which = need
        if kind in ("activity", "onset"):
            assert isinstance(self.candidates, Units)
            return activity(self.candidates, self.half, which, onset=kind == "onset", max_tokens=self.tokens)
        examples = self._sequences(need)
        key = f"{kind}-{which}-{name}"
        groups = batches(examples, max_batch_tokens=self.tokens)
        known = self.state.values.pop(key, {"done": 0, "sums": {}})
        done, sums = int(known["done"]), {source: own.clone() for source, own in known["sums"].items()}
        factors = self._factors(examples, kind)
        while done < len(groups):
            batch = groups[done]
            found = self._of(need, batch, closed, done)
            found *= torch.tensor([factors[i] for i in batch.indices])
            for row, i in enumerate(batch.indices):
                source = examples[i].source
                if source not in sums:
                    sums[source] = torch.zeros(found.shape[:2], dtype=found.dtype)
                sums[source] += found[:, :, row]
            done += 1
            if self.state.due() and done < len(groups):
                self.state.flush(**{key: {"done": done, "sums": sums}})
            tell(done, len(groups))
        self.state.flush(**{key: {"done": done, "sums": sums}})
        if kind in BY_SOURCE:
            counts = {source: sum(e.source == source for e in examples) for source in sums}
            return torch.stack([sums[source][0] / counts[source] for source in self.half.sources])
        total: Tensor = torch.stack([*sums.values()]).sum(0)
        every = total / len(self.half.undesired if which == "undesired" else examples)
        return balanced(every[:, :, None])[:, 0] if len(every) > 1 else every[0]

    @property
    def tokens(self) -> int:
        """Tokens of a batch: a single sequence where gradients of weights are wanted."""
        return self.how.max_batch_tokens if isinstance(self.candidates, Units) else 1

    def _sequences(self, need: Need) -> tuple[Example, ...]:
        if need == ODDS:
            return self.half.sequences
        return self.half.undesired if need[1] == "undesired" else self.half.preserve

    def _factors(self, examples: Sequence[Example], kind: Kind) -> list[float]:
        """Return what every sequence is multiplied by: over its target tokens, what should be said instead taken away."""
        wanted = len(self.half.undesired) if kind == "odds" else len(examples)
        half = 0.5 if kind == "harm" else 1.0
        return [half * (1 if i < wanted else -1) / e.target_tokens for i, e in enumerate(examples)]

    @cached_property
    def _intact(self) -> list[LayerInputs]:
        """What the intact model sends to its final norm on what is to stay."""
        groups = batches(self.half.preserve, max_batch_tokens=self.tokens)
        return [last_hidden(self.candidates.decoder, batch) for batch in groups]

    def _drifting(self, batch: Batch, number: int) -> Asked:
        """Return what asks for the divergence from the intact model, half of it with half of the loss but for clean texts.

        The loss of a text of another's hand may fall; what a model wrote itself has the least loss that it knows.
        """
        following = Following(self.candidates.decoder, batch, self._intact[number])
        clean = torch.tensor([self.half.preserve[i].source.startswith(CLEAN) for i in batch.indices])

        def asked(logits: Tensor, wanted: Targets, at: slice) -> Tensor:
            part = torch.where(clean[wanted.rows], 0.0, 0.5).to(logits.device)
            return (1 - part) * following(logits, wanted, at) + part * cross_entropy(logits, wanted)

        return asked

    def _of(
        self, need: Need, batch: Batch, closed: Chosen, number: int
    ) -> Float[Tensor, "gate candidate batch"]:
        """Return what one batch says, at every gate; of harm and drift where the gates are."""
        kind, run = need[0], partial(self.candidates.slopes, batch, closed=closed)
        if kind == "drift":
            return run(self._drifting(batch, number), gate=1.0, relevant=False)[None].to(self._dtype)
        if kind == "harm":
            labels = uniforms(self.half.preserve, batch, max(self.how.draws, 1), self.how.seed)
            each = [run(drawn(own), gate=1.0, relevant=False).square() for own in labels]
            return torch.stack(each).mean(0, keepdim=True).to(self._dtype)
        relevant = self.how.name == "relevance"
        asked: Asked = odds if kind == "odds" else likelihood
        if relevant:
            asked = prominence
        found = torch.stack([run(asked, gate=gate, relevant=relevant) for gate in self.how.gates])
        if kind == "size":
            found = found.abs()
        return (found.square() if kind == "square" else found).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if isinstance(self.candidates, Units) else torch.float32


def activity(units: Units, half: Half, which: Set, *, onset: bool, max_tokens: int) -> Vector:
    """Return the mean size of what every unit sends on the tokens of a set; for `onset` from the first target on less before."""
    examples = half.undesired if which == "undesired" else half.preserve
    places = list(units.of.places)
    sums = {site: torch.zeros(2, units.of.plan.sites[site], dtype=torch.float64) for site in places}
    counts = torch.zeros(2, dtype=torch.float64)
    for batch in batches(examples, max_batch_tokens=max_tokens):
        masks = _sides(batch, onset=onset)
        counts += masks.sum((1, 2))
        for site, x in seen(units.decoder, batch.tokens, places).items():
            n = sums[site].shape[1]
            size = x.abs().double().unflatten(-1, (n, -1)).mean(-1).cpu()
            sums[site] += torch.stack([size[mask].sum(0) for mask in masks])
    means: Mapping[Site, Tensor] = {site: own / counts.clamp_min(1)[:, None] for site, own in sums.items()}
    found, parts = (
        torch.zeros(units.count, dtype=torch.float64),
        torch.zeros(units.count, dtype=torch.float64),
    )
    for site, (index, owner) in units.of.places.items():
        value = means[site][0] - means[site][1] if onset else means[site][0]
        found.index_add_(0, owner, value[index])
        parts.index_add_(0, owner, torch.ones(len(owner), dtype=torch.float64))
    return found / parts.clamp_min(1)


def _sides(batch: Batch, *, onset: bool) -> Bool[Tensor, "2 batch time"]:
    """Return the tokens from the first target on and those before it, or all of them and none."""
    if not onset:
        return torch.stack([batch.real, torch.zeros_like(batch.real)])
    after = batch.is_target.cumsum(1) > 0
    return torch.stack([after & batch.real, ~after & batch.real])
