"""Masked losses of single cells (unit, sequence), each kept in a ledger: what all estimators are made of."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causalprune.attribution.questions import ELSEWHERE, Estimator, Question
from causalprune.calibration import batch_of, batches
from causalprune.core import (
    AtOnce,
    Batch,
    Calibration,
    Decoder,
    Effects,
    Ledger,
    ModelError,
    OptionError,
    Progress,
    Remarked,
    Unit,
)
from causalprune.interventions import (
    InputCache,
    LayerInputs,
    Parts,
    Site,
    by_row,
    capture,
    closing,
    cross_entropy,
    divergence,
    entered_at,
    expansion,
    gated,
    grouped_by_effect,
    list_units,
    neuron_effects,
    run_layer,
    selected,
    site_inputs,
    sites,
    target_logits,
    targets,
    uniforms,
)
from causalprune.models import fingerprint


class Workbench:
    """A model, its calibration batches and units, and the cells measured so far.

    With a ledger, every finished job is on disk before the next begins, and is not done again.
    """

    def __init__(
        self,
        decoder: Decoder,
        calibration: Calibration,
        question: Question = Question(),
        estimator: Estimator = Estimator(),
    ) -> None:
        self.decoder, self.calibration, self.question = decoder, calibration, question
        self.estimator = estimator
        self.groups = batches(calibration.examples, max_batch_tokens=estimator.max_batch_tokens)
        if question.ablation == "resample":
            self.groups = _in_company(self.groups, calibration)
        if (
            estimator.name == "adaptive"
        ):  # its cells are few per sequence: no others are walked through with them
            self.groups = batches(calibration.examples, max_batch_tokens=1)
        self._grouped = grouped_by_effect(question.units)
        slopes = neuron_effects(decoder, self.groups) if self._grouped else None
        self.units = list_units(decoder, question.units, slopes)
        self.sites = sites(decoder)
        self.depth = len(decoder.layers)
        self.number = {unit: i for i, unit in enumerate(self.units)}
        shape = len(self.units), len(calibration.examples)
        self.masked = torch.full(shape, math.nan, dtype=torch.float64)
        self.kl = torch.full(shape, math.nan, dtype=torch.float64)
        self.intact = torch.zeros(shape[1], dtype=torch.float64)
        self._at_once = AtOnce(estimator.max_batch_tokens)
        self._cell_tokens = 0.0
        self._intact_done: set[int] = set()
        self._walked: set[int] = set()
        self._cache = InputCache(decoder, self.groups, estimator.cache_gib * 2**30)
        self._intact_logits: Tensor | None = None
        self._intact_logits_of: int | None = None
        self._means: dict[Site, Tensor] = {}
        self._reached: dict[int, dict[Site, Tensor]] = {}
        self._book: Ledger | None = None
        self._check_options()

    def _check_options(self) -> None:
        ablation, how = self.question.ablation, self.estimator
        if ablation != "zero" and any(s.place == "experts" for s in self._own_sites()):
            raise OptionError(f"experts can only be ablated with 'zero', not {ablation!r}")
        if ablation == "resample" and how.name != "exact":
            raise OptionError(f"ablation 'resample' needs the estimator 'exact', not {how.name!r}")
        if how.draws < 1 and (
            how.name == "adaptive" or (how.name, self.question.effect) == ("gradient", "kl")
        ):
            raise OptionError(f"the estimator {how.name!r} of {self.question.effect!r} needs draws ≥ 1")
        if how.budget is not None and self.naive_tokens / how.budget < self.expansion_tokens:
            most = self.naive_tokens / self.expansion_tokens
            raise OptionError(f"the prediction alone costs 1/{most:.0f} of naive: choose a budget below that")

    def ledger(self, path: Path | None) -> AbstractContextManager[Any]:
        """Return a context in which finished jobs are recalled from, and added to, the file at `path`."""
        if path is None:
            return nullcontext()
        composition = repr([batch.indices for batch in self.groups])
        self._book = Ledger(
            path,
            {
                "model": self.model_fingerprint,
                "calibration": self.calibration.fingerprint,
                "batches": hashlib.sha256(composition.encode()).hexdigest(),
                **asdict(self.question),
                "estimator": {k: v for k, v in asdict(self.estimator).items() if k not in ELSEWHERE},
                **({"neurons": self.neurons()} if self._grouped else {}),
            },
        )
        return self._book

    def neurons(self) -> dict[str, list[int]]:
        """Return which neurons each group of them holds, by `layer.index`."""
        return {
            f"{unit.layer}.{unit.index}": index.tolist()
            for unit, parts in self.units.items()
            if unit.kind == "neurons"
            for index in parts.values()
        }

    @cached_property
    def model_fingerprint(self) -> str:
        """SHA-256 of the model as it is now: it may have been pruned since it was loaded."""
        return fingerprint(self.decoder.model)

    def units_of(self, layer: int) -> list[Unit]:
        """Return the units of a layer."""
        return [unit for unit in self.units if unit.layer == layer]

    def cost(self, number: int, layer: int, cells: int) -> float:
        """Return the tokens that this many cells forward, in equivalents of whole passes."""
        return cells * self.groups[number].tokens.shape[1] * (self.depth - layer) / self.depth

    def measure_intact(self, number: int) -> None:
        """Measure the intact model on a batch, once."""
        if number in self._intact_done:
            return
        self._intact_done.add(number)
        found = self.recalled(f"{number}:intact", partial(self.intact_row, number))
        columns = list(self.groups[number].indices)
        self.intact[columns] = torch.tensor(found["ce"], dtype=torch.float64)
        for layer, counts in found.get("reached", {}).items():
            site = Site(int(layer), "experts")
            self._reached.setdefault(number, {})[site] = torch.tensor(counts)
        self._cell_tokens += self.groups[number].tokens.numel()

    def measure(self, key: str, number: int, layer: int, cells: Sequence[tuple[Unit, int]]) -> None:
        """Measure cells (unit, row of the batch) whose units lie in `layer` or later."""
        if not cells:
            return
        closed = [(self.units[unit], row) for unit, row in cells]
        found = self.recalled(key, lambda: self.joint(number, layer, closed))
        at = [self.number[unit] for unit, _ in cells], [self.groups[number].indices[row] for _, row in cells]
        self.masked[at] = torch.tensor(found["ce"], dtype=torch.float64)
        if "kl" in found:
            self.kl[at] = torch.tensor(found["kl"], dtype=torch.float64)
        self._cell_tokens += self.cost(number, layer, len(cells))
        self._walked.add(number)

    def report(self, on_progress: Progress, done: int, total: int) -> None:
        """Tell how much is done, and to those who show it which unit is the strongest so far."""
        on_progress(done, total)
        if isinstance(on_progress, Remarked):
            change = self.masked - self.intact if self.question.effect == "ce" else self.kl
            tokens = torch.tensor([example.target_tokens for example in self.calibration.examples])
            mean = change.nansum(1) / (~change.isnan() * tokens).sum(1).clamp_min(1)
            unit = list(self.units)[int(mean.argmax())]
            on_progress.remark(
                f"strongest: layer {unit.layer} {unit.kind} {unit.index} ({float(mean.max()):+.3g})"
            )

    @property
    def expansion_tokens(self) -> float:
        """Tokens that predictions cost, in equivalents of whole passes: a backward pass counts as two."""
        passes = len(self.estimator.gates) * (1 + 2 * (1 + self.estimator.draws))
        return float(passes * sum(len(example.tokens) for example in self.calibration.examples))

    def expanded(self, on_progress: Progress) -> tuple[Tensor, Tensor]:
        """Return the first- and second-order parts of the prediction `[unit sequence]`, averaged over gates."""
        how, examples = self.estimator, self.calibration.examples
        first, second = torch.zeros_like(self.masked), torch.zeros_like(self.masked)
        instead = self.means() if self.question.ablation == "mean" else None
        units = list(self.units.values())
        groups = batches(examples, max_batch_tokens=how.max_batch_tokens)
        for number, batch in enumerate(groups):

            def compute(batch: Batch = batch) -> dict[str, list[Any]]:
                labels = uniforms(examples, batch, how.draws, how.seed)
                found = [
                    expansion(self.decoder, batch, units, labels, instead=instead, gate=gate)
                    for gate in how.gates
                ]
                means = [torch.stack(parts).mean(0).tolist() for parts in zip(*found, strict=True)]
                return dict(zip(("ce", "first", "second"), means, strict=True))

            row, columns = self.recalled(f"gradient:{number}", compute), list(batch.indices)
            for target, name in ((self.intact, "ce"), (first, "first"), (second, "second")):
                target[..., columns] = torch.tensor(row[name], dtype=torch.float64)
            on_progress(number + 1, len(groups))
        if any(unit.kind == "expert" for unit in self.units) or how.gates != (1.0,):
            for number in range(len(self.groups)):
                self.measure_intact(number)  # which experts get tokens, and losses where gates are open
        return first, second

    def joint(self, number: int, layer: int, cells: Sequence[tuple[Parts, int]]) -> dict[str, list[float]]:
        """Return the losses with these parts removed (from `layer` on), in these rows of a batch."""
        inputs = self._cache.get(number, layer)
        donated = self._instead(number, layer, inputs)
        if self.question.effect == "kl" and self._intact_logits_of != number:
            self.intact_row(number)  # now: inside a masked pass it would be masked too

        def losses(at: list[int]) -> Tensor:
            return self._losses(number, layer, [cells[i] for i in at], inputs, donated)

        found = self._at_once(len(cells), self.groups[number].tokens.shape[1], losses)
        both = torch.cat(found, 1).cpu()  # the only wait for the device in a job
        return {name: values.tolist() for name, values in zip(("ce", "kl"), both, strict=False)}

    def _losses(
        self,
        number: int,
        layer: int,
        cells: Sequence[tuple[Parts, int]],
        inputs: LayerInputs,
        donated: dict[Site, Tensor],
    ) -> Float[Tensor, "effect cell"]:
        """Return the losses of cells in one forward pass."""
        batch, hidden = self.groups[number], inputs.hidden[layer]
        parts, rows = zip(*cells, strict=True)
        stacked = LayerInputs({layer: hidden[list(rows)]}, inputs.as_tuple)
        part = selected(batch, list(rows))
        wanted, gates = targets(part), closing(parts, self.sites)
        instead = {s: x if len(x) == 1 else x[list(rows)] for s, x in donated.items() if s in gates}
        with (
            torch.inference_mode(),
            entered_at(self.decoder, layer, stacked),
            gated(self.decoder, gates, instead),
        ):
            logits = target_logits(self.decoder, part, wanted)
            losses = [by_row(cross_entropy(logits, wanted), wanted)]
            if self.question.effect == "kl":
                intact, at = self._compared(number, rows)
                losses.append(by_row(divergence(intact, at, logits), wanted))
        return torch.stack(losses)

    @property
    def naive_tokens(self) -> int:
        """Tokens of one whole forward pass per unit and sequence, and one of the intact model, unpadded."""
        return (len(self.units) + 1) * sum(len(example.tokens) for example in self.calibration.examples)

    @property
    def tokens_forwarded(self) -> float:
        """Tokens of masked and intact passes so far, in equivalents of whole passes, padding included."""
        walks = sum(self.groups[number].tokens.numel() for number in self._walked)
        return self._cell_tokens + walks

    def effects(self, tokens_backward: float = 0.0, **predicted: Tensor) -> Effects:
        """Return what was measured; experts that no token reached are unmeasured (NaN), not unimportant."""
        unmeasured = []
        for unit, i in self.number.items():
            if unit.kind == "expert" and not self._tokens_reaching(unit):
                for values in (self.masked, self.kl, predicted.get("predicted_nats", self.kl)):
                    values[i] = math.nan
                unmeasured.append([unit.layer, unit.index])
        reported: dict[str, Any] = {"unreached_experts": unmeasured} if unmeasured else {}
        if self._grouped:
            reported["neurons"] = self.neurons()
        return Effects(
            units=tuple(self.units),
            masked_nats=self.masked,
            intact_nats=self.intact,
            tokens=torch.tensor([example.target_tokens for example in self.calibration.examples]),
            subset=torch.tensor(self.calibration.subset),
            model_fingerprint=self.model_fingerprint,
            calibration_fingerprint=self.calibration.fingerprint,
            description={
                **self.calibration.description,
                "question": asdict(self.question),
                "estimator": asdict(self.estimator),
                "tokens_forwarded": self.tokens_forwarded + tokens_backward,
                "naive_tokens": self.naive_tokens,
                **reported,
            },
            effect=self.question.effect,
            kl_nats=self.kl if self.question.effect == "kl" else None,
            **predicted,
        )

    def recalled(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a job: from the ledger, or computed and written there."""
        if self._book is not None and key in self._book.rows:
            row: dict[str, Any] = self._book.rows[key]
            return row
        found = compute()
        for values in found.values():
            if isinstance(values, list) and not bool(torch.tensor(values).isfinite().all()):
                raise ModelError(
                    f"a loss is not finite (job {key}): look for broken weights or use a wider dtype"
                )
        if self._book is not None:
            self._book.append(key, found)
        return found

    def _tokens_reaching(self, expert: Unit) -> int:
        site = Site(expert.layer, "experts")
        return sum(int(reached[site][expert.index]) for reached in self._reached.values())

    def _own_sites(self) -> set[Site]:
        return {site for parts in self.units.values() for site in parts}

    def intact_row(self, number: int) -> dict[str, Any]:
        """Return the losses of the intact model on a batch, and how many tokens reach each expert."""
        batch, experts = self.groups[number], [s for s in self.sites if s.place == "experts"]
        experts = experts if any(unit.kind == "expert" for unit in self.units) else []
        wanted = targets(batch)
        with torch.inference_mode(), site_inputs(self.decoder, experts) as chosen:
            logits = target_logits(self.decoder, batch, wanted)
            found = {"ce": by_row(cross_entropy(logits, wanted), wanted).tolist()}
        self._intact_logits, self._intact_logits_of = logits, number
        real = batch.real.flatten()
        counts = {
            str(s.layer): x.cpu()[real].flatten().bincount(minlength=self.sites[s]).tolist()
            for s, x in chosen.items()
        }
        return found | ({"reached": counts} if experts else {})

    def _compared(self, number: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the intact logits of a batch, and for the targets of `rows` their place in them."""
        assert self._intact_logits is not None
        assert self._intact_logits_of == number
        places = targets(self.groups[number]).rows
        spans = [(places == row).nonzero()[:, 0] for row in range(len(self.groups[number].tokens))]
        return self._intact_logits, torch.cat([spans[row] for row in rows])

    def _instead(self, number: int, layer: int, inputs: LayerInputs) -> dict[Site, Tensor]:
        """Return what takes the place of removed activations: `[1 1 width]` or `[row time width]`."""
        own = [site for site in self._own_sites() if site.layer == layer]
        batch = self.groups[number]
        if self.question.ablation == "mean":
            return {site: self.means()[site] for site in own}
        if self.question.ablation == "zero":
            return {}
        with site_inputs(self.decoder, own) as seen:
            run_layer(self.decoder, batch.tokens, layer, inputs)
        donor = (torch.arange(len(batch.tokens)) + 1) % len(batch.tokens)
        time = torch.arange(batch.tokens.shape[1]) % batch.lengths[donor][:, None]
        return {s: x.reshape(*batch.tokens.shape, -1)[donor[:, None], time] for s, x in seen.items()}

    def means(self) -> dict[Site, Tensor]:
        """Return `[1 1 width]` for every site: its mean input over the calibration. One forward pass, once."""
        if self._means:
            return self._means
        sums: dict[Site, Tensor] = {}
        for batch in self.groups:
            real = batch.real.flatten()
            with site_inputs(self.decoder, list(self._own_sites())) as seen:
                capture(self.decoder, batch.tokens, stop=self.depth - 1)
            for site, x in seen.items():
                flat = x.flatten(0, -2)
                total = flat[real.to(flat.device)].double().sum(0)
                sums[site] = sums[site] + total if site in sums else total
        positions = sum(len(example.tokens) for example in self.calibration.examples)
        self._means = {site: (total / positions).view(1, 1, -1) for site, total in sums.items()}
        return self._means


def _in_company(groups: Sequence[Batch], calibration: Calibration) -> list[Batch]:
    """Return batches of two sequences at least: each needs another one to take activations from."""
    if len(calibration.examples) < 2:
        raise OptionError("ablation 'resample' needs at least 2 calibration examples")
    merged: list[list[int]] = []
    for batch in groups:
        if merged and (len(batch.indices) < 2 or len(merged[-1]) < 2):
            merged[-1] += batch.indices
        else:
            merged.append(list(batch.indices))
    return [batch_of(calibration.examples, group) for group in merged]
