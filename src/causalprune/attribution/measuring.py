"""Masked losses of single cells (unit, sequence), and what they are compared with or predicted by."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.attribution.plan import Plan
from causalprune.core import AtOnce, Batch
from causalprune.interventions import (
    InputCache,
    LayerInputs,
    Parts,
    Site,
    by_row,
    closing,
    cross_entropy,
    divergence,
    donated,
    entered_at,
    expansion,
    gated,
    means,
    relevance,
    run_layer,
    selected,
    shifted,
    site_inputs,
    target_logits,
    targets,
    uniforms,
)


class Passes:
    """Runs the model of a plan, intact or with parts removed, and keeps what the next pass needs again."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._cache = InputCache(plan.decoder, plan.groups, plan.estimator.cache_gib * 2**30)
        self._at_once = AtOnce(plan.estimator.max_batch_tokens)
        self._intact_logits: Tensor | None = None
        self._intact_logits_of: int | None = None
        self._donated: tuple[int, Mapping[Site, Tensor]] | None = None

    def joint(self, number: int, layer: int, cells: Sequence[tuple[Parts, int]]) -> dict[str, list[float]]:
        """Return the losses with these parts removed (from `layer` on), in these rows of a batch."""
        inputs = self._cache.get(number, layer)
        donated = self._instead(number, layer, inputs)
        if self.plan.question.effect == "kl" and self._intact_logits_of != number:
            self.intact_row(number)  # now: inside a masked pass it would be masked too

        def losses(at: list[int]) -> Tensor:
            return self._losses(number, layer, [cells[i] for i in at], inputs, donated)

        found = self._at_once(len(cells), self.plan.groups[number].tokens.shape[1], losses)
        both = torch.cat(found, 1).cpu()  # the only wait for the device in a job
        return {name: values.tolist() for name, values in zip(("ce", "kl"), both, strict=False)}

    def _losses(
        self,
        number: int,
        layer: int,
        cells: Sequence[tuple[Parts, int]],
        inputs: LayerInputs,
        donated: Mapping[Site, Tensor],
    ) -> Float[Tensor, "effect cell"]:
        """Return the losses of cells in one forward pass."""
        decoder, batch = self.plan.decoder, self.plan.groups[number]
        parts, rows = zip(*cells, strict=True)
        stacked = inputs.rows(layer, rows, batch.tokens)
        part = selected(batch, list(rows))
        wanted, gates = targets(part), closing(parts, self.plan.sites)
        instead = {s: x if len(x) == 1 else x[list(rows)] for s, x in donated.items() if s in gates}
        with torch.inference_mode(), entered_at(decoder, layer, stacked), gated(decoder, gates, instead):
            logits = target_logits(decoder, part, wanted)
            losses = [by_row(cross_entropy(logits, wanted), wanted)]
            if self.plan.question.effect == "kl":
                intact, at = self._compared(number, rows)
                losses.append(by_row(divergence(intact, at, logits), wanted))
        return torch.stack(losses)

    def intact_row(self, number: int) -> dict[str, Any]:
        """Return the losses of the intact model on a batch, and how many tokens reach each expert."""
        plan, batch = self.plan, self.plan.groups[number]
        asked = any(unit.kind == "expert" for unit in plan.units)
        experts = [site for site in plan.sites if site.place == "experts"] if asked else []
        wanted = targets(batch)
        with torch.inference_mode(), site_inputs(plan.decoder, experts) as chosen:
            logits = target_logits(plan.decoder, batch, wanted)
            found = {"ce": by_row(cross_entropy(logits, wanted), wanted).tolist()}
        self._intact_logits, self._intact_logits_of = logits, number
        real = batch.real.flatten()
        counts = {
            str(site.layer): x.cpu()[real]
            .flatten()
            .bincount(minlength=plan.sites[site])[: plan.sites[site]]
            .tolist()
            for site, x in chosen.items()
        }
        return found | ({"reached": counts} if experts else {})

    def predicted_row(self, batch: Batch) -> dict[str, Any]:
        """Return the intact losses of a batch, and the prediction's first order, averaged over gates, and second, at each of several."""
        plan, how = self.plan, self.plan.estimator
        ablation, units = plan.question.ablation, [*plan.units.values()]
        mean = self.means if ablation == "mean" else None
        own: dict[str, Any] = {"instead": donated(plan.decoder, batch, list(plan.own_sites), ablation, mean)}
        if how.name == "relevance":
            ce, first = relevance(plan.decoder, batch, units, **own)
            return {"ce": ce.tolist(), "first": first.tolist(), "second": torch.zeros_like(first).tolist()}
        labels = uniforms(plan.calibration.examples, batch, how.draws, how.seed)
        found = [expansion(plan.decoder, batch, units, labels, **own, gate=gate) for gate in how.gates]
        ce, first, second = (torch.stack(parts) for parts in zip(*found, strict=True))
        second = second if len(how.gates) > 1 else second[0]
        return {"ce": ce.mean(0).tolist(), "first": first.mean(0).tolist(), "second": second.tolist()}

    def _compared(self, number: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the intact logits of a batch, and for the targets of `rows` their place in them."""
        assert self._intact_logits is not None
        assert self._intact_logits_of == number
        batch = self.plan.groups[number]
        places = targets(batch).rows
        spans = [(places == row).nonzero()[:, 0] for row in range(len(batch.tokens))]
        return self._intact_logits, torch.cat([spans[row] for row in rows])

    def _instead(self, number: int, layer: int, inputs: LayerInputs) -> Mapping[Site, Tensor]:
        """Return what takes the place of removed activations: `[1 1 width]` or `[row time width]`."""
        if self.plan.question.ablation == "zero":
            return {}
        own = [site for site in self.plan.own_sites if site.layer == layer]
        if self.plan.question.ablation == "mean":
            return {site: self.means[site] for site in own}
        batch, every = self.plan.groups[number], list(self.plan.own_sites)
        if self.plan.question.ablation == "counterfactual":
            if self._donated is None or self._donated[0] != number:
                self._donated = number, donated(self.plan.decoder, batch, every, "counterfactual")
            return {site: self._donated[1][site] for site in own}
        with site_inputs(self.plan.decoder, own) as seen:
            run_layer(self.plan.decoder, batch.tokens, layer, inputs)
        return shifted(batch, {s: x.reshape(*batch.tokens.shape, -1) for s, x in seen.items()})

    @cached_property
    def means(self) -> Mapping[Site, Float[Tensor, "1 1 width"]]:
        """Mean input of every site over the calibration. One forward pass, once."""
        return means(self.plan.decoder, self.plan.groups, list(self.plan.own_sites))
